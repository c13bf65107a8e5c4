"""Low-rank adapters of a decoder's projections (LoRA, Hu et al. 2021, arXiv:2106.09685).

A projection y = W x becomes y = W x + gate * (alpha / rank) * (x A) B. For kind "lora" the gate is
1. For kind "gated" it is 1 for noise tokens and 0 for all others, so that the model's own text is
the base's, whatever the adapter is (Samragh et al. 2025, arXiv:2507.11851): noise tokens are never
part of a text, and no clean token sees one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from refine_jax import target
from refine_jax.model.layout import JOINED
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
# An H100's in a pass of the decoder: what a low-rank change costs beside its product, whose kernels
# wait to be started, and the bytes and the arithmetic of a larger product.
_CHANGE_SECONDS, _BYTES_PER_SECOND, _FLOPS = 7e-6, 2.6e12, 5e14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
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


def from_json(values: dict | None) -> Adapter | None:
  """An Adapter from its fields as JSON holds them, such as a checkpoint's; None from none."""
  if values is None:
    return None
  projections = tuple(values["projections"])
  return Adapter(
    kind=values["kind"], rank=values["rank"], alpha=values["alpha"], projections=projections
  )


def init_params(config: ModelConfig, adapter: Adapter, key: jax.Array) -> dict:
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


def working_copy(params: dict, adapter: Adapter, dtype: DTypeLike) -> dict:
  """The factors in `dtype`, with the scale in B: what the decoder multiplies by."""

  def cast(path, x):
    scaled = x * adapter.scale if path[-1].key == "b" else x
    return scaled.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def attach(params: dict, factors: dict, config: ModelConfig) -> dict:
  """The decoder's parameters with the factors of `working_copy` next to each kernel they change.

  Args:
    params: layers stacked or in a list, projections joined or not (layout.py).
    factors: layers stacked, or in a list where those of `params` are.
  """
  layers, changes = params["layers"], factors["layers"]
  if isinstance(layers, list):
    pairs = zip(layers, changes, strict=True)
    attached = [attach_layer(layer, change, config) for layer, change in pairs]
  else:
    attached = attach_layer(layers, changes, config)
  return params | {"layers": attached}


def attach_layer(layer: dict, factors: dict, config: ModelConfig) -> dict:
  """Attaches factors to one layer, or to a stack of layers: see `attach`."""
  result = dict(layer)
  for module, changes in factors.items():
    joined, parts = JOINED[module]
    if joined in layer[module]:
      apart = {name: x for name, x in changes.items() if name not in parts}
      changes = apart | _joined(changes, joined, parts, config)
    result[module] = layer[module] | {
      name: layer[module][name] | change for name, change in changes.items()
    }
  return result


def decoding_form(params: dict, paired: frozenset[str] = frozenset()) -> dict:
  """The parameters of `attach` for the decoder's passes, which wait for kernels more than for sums.

  A kernel W with factors A and B becomes [W A] beside B, so that one product of the input serves
  both; or, for the `paired` projections, [W, W + A B]: twice the bytes and the arithmetic of W, and
  no product more. There the decoder takes the second half for noise tokens.

  Args:
    params: layers in a list, projections joined or not (layout.py).
    paired: names of projections: `faster_paired`.
  """

  def formed(node, name=""):
    if not isinstance(node, dict):
      return [formed(x) for x in node] if isinstance(node, list) else node
    if "a" not in node:
      return {key: formed(x, key) for key, x in node.items()}
    rest = {key: x for key, x in node.items() if key not in ("kernel", "a", "b")}
    kernel, a, b = node["kernel"], node["a"], _on_diagonal(node["b"])
    if name in paired:
      changed = kernel + (a @ b).astype(kernel.dtype)
      return rest | {"kernel_pair": jnp.concatenate([kernel, changed], axis=-1)}
    return rest | {"kernel_a": jnp.concatenate([kernel, a], axis=-1), "b": b}

  return params | {"layers": formed(params["layers"])}


def faster_paired(layer: dict, tokens: int) -> frozenset[str]:
  """Projections that a pass over so many tokens has faster in pairs: by an H100's times, if any.

  Args:
    layer: one of the parameters of `attach`, or their shapes.
  """
  if target.platform() != "gpu":
    return frozenset()

  def pays(kernel):
    more = kernel.size * (kernel.dtype.itemsize / _BYTES_PER_SECOND + 2 * tokens / _FLOPS)
    return more < _CHANGE_SECONDS

  return frozenset(
    name
    for module in layer.values()
    for name, leaves in module.items()
    if isinstance(leaves, dict) and "a" in leaves and pays(leaves["kernel"])
  )


def _on_diagonal(b: jax.Array) -> jax.Array:
  """Second factors [parts, r, outputs] as one: fewer products, of zeros for the most part."""
  return b if b.ndim == 2 else jax.scipy.linalg.block_diag(*b)


def is_attached(params: dict) -> bool:
  """Whether the decoder's parameters hold an adapter, in whatever form."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params["layers"])]
  return any(path[-1].key in ("a", "kernel_a", "kernel_pair") for path in paths)


def _joined(changes: dict, joined: str, parts: tuple, config: ModelConfig) -> dict:
  """One pair of factors for a joined projection: A side by side, B on a diagonal of blocks.

  Where the parts are as wide as one another and all have a change, B is as many matrices.
  """
  query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
  sizes = {"query": query, "key": key, "value": key}
  widths = [sizes.get(name, config.feed_forward) for name in parts]
  if len(set(widths)) == 1 and all(name in changes for name in parts):
    return {
      joined: {
        "a": jnp.concatenate([changes[name]["a"] for name in parts], axis=-1),
        "b": jnp.stack([changes[name]["b"] for name in parts], axis=-3),
      }
    }
  firsts, seconds = [], []
  for i, name in enumerate(parts):
    if name in changes:
      firsts.append(changes[name]["a"])
      around = (sum(widths[:i]), sum(widths[i + 1 :]))
      b = changes[name]["b"]
      seconds.append(jnp.pad(b, [*[(0, 0)] * (b.ndim - 1), around]))
  if not firsts:
    return {}
  return {joined: {"a": jnp.concatenate(firsts, axis=-1), "b": jnp.concatenate(seconds, axis=-2)}}


def merge(base: dict, params: dict, adapter: Adapter) -> dict:
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
