"""Low-rank adapters of a decoder's projections (LoRA, Hu et al. 2021, arXiv:2106.09685).

A projection y = W x becomes y = W x + gate * (alpha / rank) * (x A) B. For kind "lora" the gate is
1. For kind "gated" it is 1 for noise tokens and 0 for all others, so that the model's own text is
the base's, whatever the adapter is (Samragh et al. 2025, arXiv:2507.11851): noise tokens are never
part of a text, and no clean token sees one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from refine_jax.model.transformer import ModelConfig, param_shapes

KINDS = ("gated", "lora")
# Projection -> the module of a layer that it stands in.
PROJECTIONS = {
  "query": "attention",
  "key": "attention",
  "value": "attention",
  "output": "attention",
  "gate": "mlp",
  "up": "mlp",
  "down": "mlp",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """An adapter's shape.

  Attributes:
    kind: one of KINDS.
    rank: of each change of a matrix.
    alpha: the change is multiplied by alpha / rank.
    projections: names of PROJECTIONS that have a change.
  """

  kind: str = "gated"
  rank: int = 128
  alpha: float = 1024.0
  projections: tuple[str, ...] = tuple(PROJECTIONS)

  @property
  def scale(self) -> float:
    """What the product of the two factors is multiplied by."""
    return self.alpha / self.rank


def init_params(config: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict:
  """A new adapter, float32, that changes nothing yet.

  Returns:
    {"layers": {module: {projection: {"a": [L, inputs, rank], "b": [L, rank, outputs]}}}}, A uniform
    in +-1/sqrt(inputs) as peft has it, B zero.
  """
  layers = param_shapes(config)["layers"]
  result: dict = {}
  for name, projection_key in zip(
    adapter.projections, jax.random.split(key, len(adapter.projections)), strict=True
  ):
    module = PROJECTIONS[name]
    count, inputs, outputs = layers[module][name]["kernel"].shape
    bound = inputs**-0.5
    shape = (count, inputs, adapter.rank)
    result.setdefault(module, {})[name] = {
      "a": jax.random.uniform(projection_key, shape, minval=-bound, maxval=bound),
      "b": jnp.zeros((count, adapter.rank, outputs)),
    }
  return {"layers": result}


def working_copy(params: dict, adapter: AdapterConfig, dtype) -> dict:
  """The factors in `dtype`, with the scale in B: what the decoder multiplies by."""

  def cast(path, x):
    scaled = x * adapter.scale if path[-1].key == "b" else x
    return scaled.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def merge(base: dict, params: dict, adapter: AdapterConfig) -> dict:
  """The base's parameters with the changes of a "lora" adapter added, in the base's dtypes.

  Raises:
    ValueError: the adapter is gated; no one matrix does what it does.
  """
  if adapter.kind != "lora":
    raise ValueError(f"an adapter of kind {adapter.kind!r} cannot be merged")
  layers = {module: dict(leaves) for module, leaves in base["layers"].items()}
  for module, projections in params["layers"].items():
    for name, factors in projections.items():
      kernel = layers[module][name]["kernel"]
      change = jnp.einsum("lir,lro->lio", factors["a"], factors["b"]) * adapter.scale
      merged = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
      layers[module][name] = layers[module][name] | {"kernel": merged}
  return base | {"layers": layers}
