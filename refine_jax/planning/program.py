"""The programs of a run, compiled ahead of time: its step, and a pass of its model's decoding."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from refine_jax import sharding
from refine_jax.attention import cached
from refine_jax.batch import Batch
from refine_jax.config import Config
from refine_jax.decoding import programs, sampler
from refine_jax.decoding import state as state_lib
from refine_jax.decoding.settings import Settings, least_window
from refine_jax.model import adapters, layout, transformer
from refine_jax.model.transformer import ModelConfig
from refine_jax.objective import draft_blocks
from refine_jax.training import choices, train_step
from refine_jax.training.data_plan import RowLimits
from refine_jax.training.forward import ForwardConfig
from refine_jax.training.step_config import StepConfig


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows as they are assumed where no data is read: full, with examples of one length.

  Attributes:
    length: tokens of a row.
    examples: of a row, all response.
  """

  length: int
  examples: int

  @property
  def max_segments(self) -> int:
    return self.examples

  @property
  def mean_length(self) -> float:
    """Tokens of an example."""
    return self.length / self.examples

  def most_tiles(self, drafts: int) -> int:
    """Blocks of `drafts` tokens that tile the examples of a row, at most."""
    response = np.asarray(-(-self.length // self.examples))
    return self.examples * int(draft_blocks.most_tiles(response, drafts))


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step, and the shapes and places of what it takes.

  Attributes:
    mesh, forward, step_config: as a run has them, every "auto" resolved.
    state: TrainState of jax.ShapeDtypeStruct with shardings.
    frozen: the base of an adapter likewise, or None.
    batch: arrays [A, B, T] likewise.
  """

  mesh: Mesh
  forward: ForwardConfig
  step_config: StepConfig
  state: train_step.TrainState
  frozen: dict | None
  batch: Batch

  def jitted(self) -> Callable:
    """The step as a run jits it."""
    places = jax.tree.map(lambda x: x.sharding, self.state)
    return train_step.jit_train_step(self.step_config, self.forward, places)

  def compile(self) -> tuple[Any, float]:
    """The executable, and the seconds that making it took."""
    start = time.perf_counter()
    compiled = self.jitted().lower(self.state, self.batch, self.frozen).compile()
    return compiled, time.perf_counter() - start


def make_step(config: Config, model: ModelConfig, mesh: Mesh, rows: RowLimits) -> Step:
  """A run's step without its data: what depends on examples is as `rows` has it.

  Raises:
    UserError: the batch or the model cannot be split over the mesh.
  """
  sharding.check_fit(mesh, config.optim, model.heads, model.kv_heads, config.data.max_length)
  forward = choices.choose_forward(config, model, mesh, rows)
  noise_token = config.noise.token_id or 0
  gated = config.adapter.kind == "gated"
  tiles = None
  if gated and not config.noise.anchors:
    tiles = rows.most_tiles(config.noise.block_size - 1)
  step_config = StepConfig(
    objective=config.objective,
    noise=config.noise,
    optim=config.optim,
    noise_token=noise_token,
    eos_token=noise_token,
    total_steps=config.optim.step_limit or 1000,
    seed=config.seed,
    gated=gated,
    most_tiles=tiles,
  )
  key = jax.random.key(0)
  state = jax.eval_shape(
    lambda: train_step.init_state(choices.new_params(model, forward.adapter, key), config.optim)
  )
  frozen = None
  if forward.adapter is not None:
    frozen = placed(jax.eval_shape(forward.freeze, transformer.param_shapes(model)), mesh)
  optim, length = config.optim, config.data.max_length
  by_row = sharding.batch_sharding(mesh, accumulated=True)

  def array(dtype):
    shape = (optim.accumulation, optim.micro_batch, length)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)

  ids = array(jnp.int32)
  batch = Batch(ids, ids, ids, response_mask=array(jnp.bool_), example_ids=ids)
  return Step(mesh, forward, step_config, placed(state, mesh), frozen, batch)


def placed(shapes: Any, mesh: Mesh) -> Any:
  """A tree of shapes with the places that its arrays have on the mesh."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    sharding.shardings(shapes, mesh),
  )


@dataclasses.dataclass(frozen=True)
class Pass:
  """A pass of decoding on one device, compiled.

  Attributes:
    rows, places: rows that decode together, and places of each one's cache.
    tokens: of a row that a pass runs over.
    draft: where drafts come from.
    parameter_bytes, cache_bytes: on the device.
    compiled: the executable of sampler.decode.
    seconds: that compiling took.
  """

  rows: int
  places: int
  tokens: int
  draft: str
  parameter_bytes: int
  cache_bytes: int
  compiled: Any
  seconds: float


def pass_bytes(config: Config, model: ModelConfig, rows: int, places: int) -> int:
  """Bytes of a model and its caches in the computing dtype; an adapter is left out."""
  dtype = jnp.dtype(config.model.compute_dtype)
  count = sum(x.size for x in jax.tree.leaves(transformer.param_shapes(model)))
  return count * dtype.itemsize + state_lib.cache_bytes(model, rows, places, dtype)


def compile_pass(config: Config, model: ModelConfig, device: Any, rows: int, places: int) -> Pass:
  """Compiles the loop over passes in which a trained model answers, in the computing dtype."""
  dtype = jnp.dtype(config.model.compute_dtype)
  adapter = choices.make_adapter(config)
  gated = adapter is not None and adapter.kind == "gated"
  branches = gated or config.noise.kind == "block"
  settings = Settings(
    block=config.noise.block_size,
    draft="branches" if branches else "tail",
    adapted=gated,
    engine="kernel" if cached.kernel_is_for(model, dtype) else "xla",
    least_window=least_window(rows),
  )

  def form(params, factors):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    params = layout.join_projections(layout.unstack_layers(params))
    if adapter is None or not gated:
      return params
    factors = layout.unstack_layers(adapters.working_copy(factors, adapter, dtype))
    attached = adapters.attach(params, factors, model)
    paired = adapters.faster_paired(attached["layers"][0], rows * settings.tokens)
    return adapters.decoding_form(attached, paired=paired)

  place = jax.sharding.SingleDeviceSharding(device)

  def put(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

  factors = choices.param_shapes(model, adapter) if gated else None
  params = put(jax.eval_shape(form, transformer.param_shapes(model), factors))
  empty = functools.partial(state_lib.empty, model, settings, rows, places, dtype)
  state = put(jax.eval_shape(empty))
  ended = jax.ShapeDtypeStruct((rows,), bool, sharding=place)
  one = jax.ShapeDtypeStruct((), jnp.int32, sharding=place)
  start = time.perf_counter()
  function = programs.jitted(sampler.decode, model, settings, place)
  lowered = function.lower(params, state, ended, one, one)
  compiled = lowered.compile(programs.compiler_options(rows * settings.tokens))
  return Pass(
    rows,
    places,
    settings.tokens,
    settings.draft,
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
    state_lib.cache_bytes(model, rows, places, dtype),
    compiled,
    time.perf_counter() - start,
  )
