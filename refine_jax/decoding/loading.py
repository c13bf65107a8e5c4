"""A model to look at and to sample from: `load`."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from refine_jax import compile_cache, files, sharding
from refine_jax.attention import cached, packed
from refine_jax.batch import Array, Batch
from refine_jax.decoding import plans, sources
from refine_jax.decoding.plans import Plan
from refine_jax.errors import UserError
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.generation_config import Refinement, read_generation_config
from refine_jax.hf.peft import LoadedAdapter
from refine_jax.model import adapters, layout, transformer
from refine_jax.model.transformer import ModelConfig
from refine_jax.text.tokenizer import Tokenizer, load_tokenizer
from refine_jax.text.vocabulary import check_ids


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """Parameters with what it takes to use them.

  Attributes:
    config: the shape.
    params: nested dict of arrays, layers stacked (model.init_params); those of a run may have any
      form of layout.py, and what is in the form of decoding then is not copied for it.
    tokenizer: None where the directory has none; then prompts are token ids.
    eos_token_ids: any of them ends an answer; may be empty.
    pad_token_id: or None.
    refinement: what it was trained with; None where that is not known.
    directory: where it was loaded from.
    adapter: a gated one, which acts on noise tokens while answers are generated; or None.
    plans: what `refine_jax.tune` measured: device kind -> rows -> plans.
  """

  config: ModelConfig
  params: dict
  tokenizer: Tokenizer | None
  eos_token_ids: tuple[int, ...]
  pad_token_id: int | None
  directory: Path
  refinement: Refinement | None = None
  adapter: LoadedAdapter | None = None
  plans: dict[str, dict[int, tuple[Plan, ...]]] = dataclasses.field(default_factory=dict)

  def __call__(self, ids: Array, segment_ids: Array | None = None) -> jax.Array:
    """Logits of whole sequences: float32 [B, T, V]. A gated adapter has no part in them.

    Args:
      ids: int [B, T].
      segment_ids: int [B, T], contiguous from 1 (0: padding); positions start anew in each and
        attention does not cross. Default: one segment a row.
    """
    if not isinstance(ids, Tracer):
      check_ids(np.asarray(ids), self.config.vocab_size, "ids", self.tokenizer)
    ids = jnp.asarray(ids, jnp.int32)
    segment_ids = jnp.ones_like(ids) if segment_ids is None else jnp.asarray(segment_ids)
    return _logits(self.params, ids, segment_ids, self.config)

  @functools.cached_property
  def idle_engines(self) -> list:
    """Engines of past calls with their caches, for the next ones (pool.py)."""
    return []

  @functools.cached_property
  def mesh(self) -> Mesh | None:
    """What the parameters are split over; None: they are on one device."""
    place = jax.tree.leaves(self.params["layers"])[0].sharding
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None

  @functools.cached_property
  def size(self) -> dict[str, int]:
    """`parameters` of the layers, and the `itemsize` of each."""
    leaves = jax.tree.leaves(self.params["layers"])
    return {"parameters": sum(x.size for x in leaves), "itemsize": leaves[0].dtype.itemsize}

  @functools.cached_property
  def base_decoding_params(self) -> dict:
    """The parameters, unstacked and joined (layout.py), made when first needed.

    On several devices they are not joined: that would mix up what each device has.
    """
    return layout.unstack_layers(self.params) if self.mesh else layout.decoding_form(self.params)

  def decoding_params(self, tokens: int) -> dict:
    """The parameters with the adapter, if there is one, as passes over so many tokens have them."""
    if self.adapter is None:
      return self.base_decoding_params
    paired = self._paired_for(tokens)
    if paired not in self._adapted:
      form = jax.jit(adapters.decoding_form, static_argnames="paired")
      self._adapted[paired] = form(self._attached, paired=paired)
    return self._adapted[paired]

  @functools.cached_property
  def _attached(self) -> dict:
    """The parameters, and next to them the adapter's factors in the layers' dtype."""
    assert self.adapter is not None
    dtype = jax.tree.leaves(self.base_decoding_params["layers"][0])[0].dtype
    factors = adapters.working_copy(self.adapter.factors, self.adapter.shape, dtype)
    factors = layout.unstack_layers(factors)
    return adapters.attach(self.base_decoding_params, factors, self.config)

  @functools.cached_property
  def _paired_for(self) -> Callable[[int], frozenset[str]]:
    """Tokens of a pass -> adapters.faster_paired, kept: every step of an engine asks."""
    layer = self._attached["layers"][0]
    return functools.cache(lambda tokens: adapters.faster_paired(layer, tokens))

  @functools.cached_property
  def _adapted(self) -> dict[frozenset[str], dict]:
    """Paired projections -> the parameters of that form, made when first needed."""
    return {}

  @functools.cached_property
  def cache_engine(self) -> str:
    """The engine of cache_attention for these parameters; the kernel is for one device."""
    leaf = jax.tree.leaves(self.base_decoding_params["layers"][0])[0]
    return "xla" if self.mesh else cached.choose_engine(self.config, leaf.dtype)

  def require_tokenizer(self) -> Tokenizer:
    """The tokenizer.

    Raises:
      UserError: there is none.
    """
    if self.tokenizer is None:
      raise UserError(
        f"{self.directory} has no tokenizer, so text cannot be used; give token ids instead."
      )
    return self.tokenizer


def hidden_states(
  params: dict, config: ModelConfig, ids_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
  """Last hidden states of whole sequences: [B, T, D] in the layers' dtype; see Model.__call__."""
  batch = Batch(ids_BT, packed.segment_positions(segment_ids_BT), segment_ids_BT)
  dtype = jax.tree.leaves(params["layers"])[0].dtype
  return transformer.hidden_states(params, config, batch, packed.for_batch(batch), dtype=dtype)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, ids_BT, segment_ids_BT, config):
  return transformer.logits(params, hidden_states(params, config, ids_BT, segment_ids_BT))


def load(
  name: str | Path,
  *,
  dtype: DTypeLike | None = None,
  step: int | None = None,
  tensor: int = 1,
) -> Model:
  """Loads a Hugging Face directory, a hub name, a PEFT LoRA directory, or the workdir of a run.

  A LoRA adapter is merged into its base; a gated one stays next to it (docs/adapters.md).

  Args:
    dtype: of the parameters; default: what the files have (float32 in a workdir whose run trained
      all weights).
    step: of a workdir; default: its newest checkpoint.
    tensor: how many devices share the model: each has a part of heads, features, vocabulary and
      caches. Not for a gated adapter.

  Raises:
    UserError: there is nothing to load, it does not fit its config.json, dtype is no float, or the
      model cannot be shared by so many devices.
  """
  try:
    floating = dtype is None or jnp.issubdtype(dtype, jnp.floating)
  except TypeError:
    floating = False
  if not floating:
    raise UserError(f"dtype={dtype!r} is none of float32, bfloat16 and float16.")
  compile_cache.enable()
  place = files.local_path(str(name), "model")
  if (place / "checkpoints").is_dir() and (place / "model").is_dir():
    found = sources.from_workdir(place, step)
  elif step is not None:
    raise UserError(f"step={step} goes with the workdir of a run, and {name} is none.")
  else:
    found = sources.from_directory(hf_weights.find(str(name)))
  adapter = found.adapter
  if tensor != 1:
    return from_params(_shared(found, tensor, dtype), found.config, found.directory)
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype or x.dtype), found.params)
  if adapter is not None and adapter.shape.kind == "lora":
    params, adapter = adapters.merge(params, adapter.factors, adapter.shape), None
  return from_params(params, found.config, found.directory, adapter)


def _shared(found: sources.Source, tensor: int, dtype: DTypeLike | None) -> dict:
  """The parameters with layers unstacked, split over so many devices, a leaf at a time."""
  config = found.config
  if found.adapter is not None:
    raise UserError(f"tensor={tensor} is for models without an adapter; leave it out, or merge it.")
  for what, count in (("heads", config.heads), ("key/value heads", config.kv_heads)):
    if tensor < 1 or count % tensor:
      raise UserError(f"tensor={tensor} does not divide the model's {what} ({count}).")
  if tensor > jax.local_device_count():
    raise UserError(f"tensor={tensor}: there are {jax.local_device_count()} devices.")
  mesh = sharding.tensor_mesh(jax.local_devices()[:tensor])
  params = layout.unstack_layers(found.params)
  return jax.tree.map(
    lambda x, place: jax.device_put(np.asarray(x).astype(dtype or x.dtype), place),
    params,
    sharding.shardings(params, mesh),
  )


def from_params(
  params: dict, config: ModelConfig, directory: Path, adapter: LoadedAdapter | None = None
) -> Model:
  """A Model of these parameters, with the tokenizer and the special ids of a directory."""
  tokenizer = _tokenizer(directory)
  generation = read_generation_config(directory, config)
  eos = generation.eos_token_ids
  if eos is None and tokenizer is not None and tokenizer.eos_token_id is not None:
    eos = (int(tokenizer.eos_token_id),)
    check_ids(eos, config.vocab_size, f"{directory}: the tokenizer's EOS", tokenizer)
  return Model(
    config,
    params,
    tokenizer,
    eos or (),
    generation.pad_token_id,
    directory,
    generation.refinement,
    adapter,
    plans.read(directory),
  )


def _tokenizer(directory: Path):
  """The directory's tokenizer, or None if it has no file of one."""
  files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
  if not any((directory / name).exists() for name in files):
    return None
  return load_tokenizer(directory)
