"""What happens before the first step: model, data, compute, state, and the printed summary."""

import dataclasses
import json
from pathlib import Path

import grain
import jax
from jax.sharding import Mesh

from refine_jax import sharding
from refine_jax.checkpoint.checkpointer import Checkpointer
from refine_jax.config import Config
from refine_jax.config.key import nearest
from refine_jax.errors import UserError
from refine_jax.hf import weights as hf_weights
from refine_jax.model import adapters
from refine_jax.model.transformer import ModelConfig
from refine_jax.text.vocabulary import check_ids
from refine_jax.training import optim, train_step
from refine_jax.training.choices import (
  bytes_per_device,
  make_adapter,
  most_tiles,
  new_params,
  trained_columns,
)
from refine_jax.training.data_plan import DataPlan
from refine_jax.training.forward import ForwardConfig
from refine_jax.training.metrics import gibibytes
from refine_jax.training.source import ModelSource
from refine_jax.training.step_config import StepConfig
from refine_jax.tree import leaf_name


def make_step_config(config: Config, source: ModelSource, plan: DataPlan) -> StepConfig:
  """The noise token is EOS unless the config names an id of the vocabulary."""
  token = config.noise.token_id
  if token is None:
    token = source.tokenizer.eos_token_id
  for what, ids in (
    ("config.noise.token", [token]),
    ("The tokenizer's EOS", [source.tokenizer.eos_token_id]),
  ):
    check_ids(ids, source.model.vocab_size, what, source.tokenizer)
  return StepConfig(
    objective=config.objective,
    noise=config.noise,
    optim=config.optim,
    noise_token=token,
    eos_token=source.tokenizer.eos_token_id,
    total_steps=plan.total_steps,
    seed=config.seed,
    gated=config.adapter.kind == "gated",
    most_tiles=most_tiles(config, plan),
  )


def identity(
  shape: ModelConfig, adapter: adapters.Adapter | None = None, base: str | None = None
) -> dict:
  """What a checkpoint says of its model, to be compared before it is loaded.

  Args:
    adapter, base: of a run that trains one: it, and the fingerprint of the base's weights.
  """
  if adapter is None:
    return shape.record()
  extra = {"adapter": dataclasses.asdict(adapter), "base": base}
  return json.loads(json.dumps(shape.record() | extra))


def run_record(config: Config, step_config: StepConfig, plan: DataPlan) -> dict:
  """What makes a run, besides its model: name -> JSON; a checkpoint keeps it, a resume compares it.

  "data" is the tokenised training examples; the others are keys of the config, resolved.
  """
  sections = {"objective": config.objective, "noise": config.noise}
  values = {
    f"{section}.{key}": value
    for section, keys in sections.items()
    for key, value in dataclasses.asdict(keys).items()
  }
  values |= {
    "seed": config.seed,
    "data": plan.fingerprint(),
    "data.max_length": config.data.max_length,
    "data.max_segments": config.data.max_segments if config.data.pack else 1,
    "noise.token": step_config.noise_token,
    "optim.batch_size": config.optim.batch_size,
    "optim.total_steps": step_config.total_steps,
  }
  unknown = sorted(set(config.checkpoint.allow_changes) - values.keys())
  if unknown:
    raise UserError(
      f"config.checkpoint.allow_changes names {unknown[0]!r}, which is not compared with the"
      f" checkpoint; what is: {', '.join(sorted(values))}.{nearest(unknown[0], values)}"
    )
  return json.loads(json.dumps(values))


def abstract_state(config: Config, source: ModelSource, mesh: Mesh) -> train_step.TrainState:
  """The state's shapes, dtypes and shardings, without arrays."""
  shapes = jax.eval_shape(
    lambda: train_step.init_state(
      new_params(source.model, make_adapter(config), jax.random.key(0)), config.optim
    )
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.shardings(shapes, mesh),
  )


def init_or_restore(
  config: Config,
  source: ModelSource,
  mesh: Mesh,
  checkpointer: Checkpointer,
  iterator: grain.DatasetIterator,
  run: dict,
  ours: dict,
) -> tuple:
  """The state to go on from. The order: own workdir, resume path, pretrained weights, scratch.

  Args:
    run, ours: run_record's and identity's, compared with those of the checkpoint.

  Returns:
    the TrainState, on its devices; a line that says where it is from.
  """
  adapter = make_adapter(config)
  abstract = abstract_state(config, source, mesh)
  places = jax.tree.map(lambda x: x.sharding, abstract)
  compared = {"run": run, "allow": config.checkpoint.allow_changes, "check": _check_position}
  if checkpointer.has_any():
    state, step = checkpointer.restore(None, abstract, iterator, ours, **compared)
    return state, f"resumed at step {step} from {checkpointer.directory}"
  if config.checkpoint.resume_mode == "resume_path":
    state, path = checkpointer.restore_from(
      config.checkpoint.resume_from_path, abstract, iterator, ours, **compared
    )
    return state, f"resumed from {path}"
  init_state = jax.jit(
    lambda params: train_step.init_state(params, config.optim),
    out_shardings=places,
    donate_argnums=0,
  )
  if source.pretrained and adapter is None:
    by_name = {leaf_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(places.params)}

    def place(name, array):  # a leaf at a time: never two copies of the model on the host
      return jax.make_array_from_callback(
        array.shape, by_name[name], lambda index: array[index].astype("float32")
      )

    params = hf_weights.load_params(source.directory, source.model, place=place)
    return init_state(params), f"pretrained weights from {source.directory}"
  init_params = jax.jit(
    lambda: new_params(source.model, adapter, jax.random.key(config.seed)),
    out_shardings=places.params,
  )
  origin = "scratch" if adapter is None else f"a new adapter on {source.directory}"
  return init_state(init_params()), origin


def _check_position(step: int, state, iterator):
  """Raises ValueError where a checkpoint's parts are not all of one step: each takes one batch."""
  position = iterator.get_state()["next_index"]
  if int(state.step) != step or position != step:
    raise ValueError(
      f"its state is after step {int(state.step)}, its data at batch {position}, not at {step}"
    )


def save_hf(workdir: Path, step: int, params: dict, identity: dict) -> Path | None:
  """This step's parameters as Hugging Face files; `identity` as its checkpoint has it."""
  from refine_jax.hf.export_step import export_step

  return export_step(workdir, step, params, identity=identity)


def describe(
  config: Config,
  source: ModelSource,
  plan: DataPlan,
  step_config: StepConfig,
  forward: ForwardConfig,
  state: train_step.TrainState,
  origin: str,
  frozen: dict | None = None,
) -> list:
  """Lines with every number that follows from the config, the data and the devices.

  Args:
    frozen: the base of an adapter, in a form of layout.py.
  """
  mesh, shape = forward.mesh, source.model
  assert mesh is not None  # None is for single functions; a run makes one
  axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
  count = sum(x.size for x in jax.tree.leaves(state.params if frozen is None else frozen))
  base, params, everything = (
    gibibytes(bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree)))
    for tree in (frozen or {}, state.params, state)
  )
  params = f"{params} of parameters" if frozen is None else f"{base} of the base, {params} trained"
  batch, length = config.optim.batch_size, config.data.max_length
  micro = config.optim.micro_batch
  rows = plan.train
  noise = "random noise tokens" if config.noise.random else f"noise token {step_config.noise_token}"
  trained = []
  if forward.adapter is not None:
    factors = sum(x.size for x in jax.tree.leaves(state.params))
    trained = [
      f"adapter       {forward.adapter.kind}, rank {forward.adapter.rank}, alpha"
      f" {forward.adapter.alpha:g}, {factors / 1e6:.1f} M parameters"
    ]
  if step_config.gated:
    which = "" if config.noise.anchors else ", which tile the responses"
    trained += [
      f"drafts        target {config.objective.draft_target}, {noise},"
      f" {trained_columns(config, plan) // (config.noise.block_size - 1)} blocks of"
      f" {config.noise.block_size - 1} a row{which}, attention {forward.draft_attention}"
    ]
  else:
    rounds = f"{config.objective.num_iterations}, weights {config.objective.loss_weights}"
    trained += [f"rounds        {rounds}, {noise}"]
  return [
    f"devices       {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes}",
    f"model         {count / 1e6:.1f} M parameters, {shape.layers} layers, width {shape.width}",
    f"memory        {params}, {everything} of state a device",
    f"compute       {forward.dtype}, attention {forward.attention}, remat {forward.remat},"
    f" head gradient {forward.head_gradient}",
    f"batch         {batch} rows of {length}: {config.optim.accumulation} micro-batches of"
    f" {micro}, {micro // sharding.batch_shards(mesh)} a device; {batch * length} slots a step,"
    f" {rows.packing_efficiency:.1%} filled (at most {plan.max_segments} examples a row)",
    f"steps         {step_config.total_steps} ({rows.batches_per_epoch:.1f} an epoch),"
    f" warm-up {optim.warmup_steps(config.optim, step_config.total_steps)}",
    *trained,
    f"start         {origin}",
  ]
