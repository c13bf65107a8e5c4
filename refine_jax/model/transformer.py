"""One causal decoder: layers of layer.py between an embedding and a final norm.

The stack is a `lax.scan` over layers whose parameters carry a
leading layer axis (or a plain loop, where the parameters come as a list of layers). Everything
outside this file sees pure functions on nested dicts of arrays.

Legend, used in names throughout the project:
  B batch, T length, D width, H query heads, K key/value heads, h head width, F feed-forward
  width, V vocabulary, L layers, N tokens in a flat list or a block.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from refine_jax.batch import Batch
from refine_jax.model import remat as remat_lib
from refine_jax.model import rope as rope_lib
from refine_jax.model.config import ModelConfig
from refine_jax.model.layer import ACTIVATIONS, Attend, Constrain, Gate, Layer, anywhere, norm

__all__ = [
  "ACTIVATIONS",
  "Attend",
  "ModelConfig",
  "cast_for_compute",
  "head_matrix",
  "hidden_states",
  "init_params",
  "logits",
  "norm",
  "param_shapes",
]


def init_params(config: ModelConfig, key: jax.Array) -> dict:
  """Random float32 parameters.

  Returns:
    {"embedding": [V, D], "layers": {...: [L, ...]}, "final_norm": {"scale": [D]}, and, where the
    head is not tied, "head": [V, D]}. Kernels are [inputs, outputs].
  """
  embedding_key, head_key, layers_key = jax.random.split(key, 3)
  x = jnp.zeros((1, 1, config.width))
  rotation = rope_lib.rotation(config.rope, config.head_dim, jnp.zeros((1, 1), jnp.int32))

  def init_layer(layer_key):
    attend = lambda q, k, v, cache, scale: (q, cache)  # noqa: E731  init needs shapes only
    return Layer(config).init(layer_key, x, rotation, attend)["params"]

  table = nn.initializers.normal(config.initializer_range)
  shape = (config.vocab_size, config.width)
  params = {
    "embedding": table(embedding_key, shape),
    "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.layers)),
    "final_norm": norm(config).init(head_key, x)["params"],
  }
  if not config.tied_head:
    params["head"] = table(head_key, shape)
  return params


def param_shapes(config: ModelConfig) -> dict:
  """The tree of `init_params` as jax.ShapeDtypeStruct, without computing it."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def head_matrix(params: dict) -> jax.Array:
  """The output head [V, D]: its own, or the embedding where they are tied."""
  return params.get("head", params["embedding"])


def logits(params: dict, x: jax.Array) -> jax.Array:
  """Logits of hidden states [.., D], multiplied in their dtype: float32 [.., V]."""
  head = head_matrix(params).astype(x.dtype)
  return jnp.einsum("...d,vd->...v", x, head, preferred_element_type=jnp.float32)


def cast_for_compute(params: dict, dtype: DTypeLike) -> dict:
  """The working copy: the layers' kernels and biases in `dtype`, the rest as it is.

  The embedding and the head stay in float32, so that their gradients, sums over many tokens, are
  float32 too: a bfloat16 scatter-add is slow on GPU (openxla/xla#26371) and rounds each term.
  Norm scales are used in float32.
  """

  def cast(path, x):
    return x if path[-1].key == "scale" else x.astype(dtype)

  return params | {"layers": jax.tree_util.tree_map_with_path(cast, params["layers"])}


def hidden_states(
  params: dict,
  config: ModelConfig,
  batch: Batch,
  attend_with: Callable[[int | None], Attend],
  *,
  dtype: DTypeLike = jnp.float32,
  remat: str = "none",
  unroll: int = 1,
  backward_slack: int = 0,
  constrain: Constrain = anywhere,
  caches: list | None = None,
  adapt_all: bool = False,
) -> Any:
  """Runs the decoder up to its final norm.

  Args:
    params: as `init_params` makes them, or in a form of layout.py; with the factors of an adapter
      in them (adapters.attach), or without.
    batch: the tokens [B, T]; their ids, positions and is_noise are read here.
    attend_with: gives the attention engine for a sliding window (None: no window).
    dtype: of the activations.
    remat: one of remat.POLICIES.
    unroll: layers in one step of the scan; not read for a list of layers.
    backward_slack: how many layers the backward pass may go on before the gradients of a layer's
      weights must be there; only for a list of layers.
    constrain: applied to the residual stream, heads and features, to pin their sharding.
    caches: one attention cache a layer; only with a list of layers.
    adapt_all: an adapter acts on every token; otherwise it acts on noise tokens alone.

  Returns:
    hidden states [B, T, D] in `dtype`; with `caches`, also the list of new ones.
  """
  x = constrain(embed(params, config, batch.ids, dtype), "residual")
  rotation_with = rotations(config, batch.positions)
  gate: Gate = adapt_all or (False if batch.is_noise is None else batch.is_noise[..., None])

  def layer(x, layer_params, cache, window, prevent_cse=True):
    def run(x, layer_params, cache):
      module = Layer(config, constrain)
      rotation, attend = rotation_with(window), attend_with(window)
      x, cache = module.apply({"params": layer_params}, x, rotation, attend, cache, gate)
      return constrain(x, "residual"), cache

    if remat != "none":
      run = jax.checkpoint(run, policy=remat_lib.policy(remat), prevent_cse=prevent_cse)
    return run(x, layer_params, cache)

  if isinstance(params["layers"], list):
    layers, new_caches = list(params["layers"]), caches and list(caches)
    if caches:
      layer = _traced_once(layer)
    for i in range(len(layers)):
      late = i + backward_slack
      if late < len(layers):
        x, layers[late] = _trained_in_order(x, layers[late])
      x, cache = layer(x, layers[i], caches and caches[i], config.windows[i])
      if new_caches:
        new_caches[i] = cache
  else:
    assert caches is None, "a cache needs a list of layers"
    new_caches = None
    x = scan_layers(layer, x, params["layers"], config.windows, unroll)
  x = norm(config).apply({"params": params["final_norm"]}, x)
  return x if caches is None else (x, new_caches)


def embed(params: dict, config: ModelConfig, ids_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
  """The embeddings [B, T, D] of tokens, scaled as the model has it."""
  x = jnp.take(params["embedding"], ids_BT, axis=0).astype(dtype)
  return x if config.embedding_scale is None else x * jnp.asarray(config.embedding_scale, dtype)


def rotations(config: ModelConfig, positions_BT: jax.Array) -> Callable:
  """Window of a layer -> its (cos, sin); each rope's angles are computed once."""
  rotation = rope_lib.rotation(config.rope, config.head_dim, positions_BT)
  if config.sliding_rope is None:
    return lambda window: rotation
  sliding = rope_lib.rotation(config.sliding_rope, config.head_dim, positions_BT)
  return lambda window: rotation if window is None else sliding


def _traced_once(layer: Callable) -> Callable:
  """The layer, whose Python runs once for each window and shape, not once for each layer.

  XLA inlines the calls, so that the program is the same.
  """
  jitted = functools.cache(
    lambda window: jax.jit(lambda x, layer_params, cache: layer(x, layer_params, cache, window))
  )
  return lambda x, layer_params, cache, window: jitted(window)(x, layer_params, cache)


# The identity, whose gradients wait for one another. Without it XLA puts off to the end what gives
# the weights' gradients, and keeps what that needs of nearly all layers.
backward_in_order = jax.custom_vjp(lambda tree: tree)
backward_in_order.defvjp(
  lambda tree: (tree, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)


def _trained_in_order(x, layer: dict) -> tuple:
  """Orders the gradients of a layer's trained parameters; with an adapter, of its factors alone."""

  def is_factor(path):
    return path[-1].key in ("a", "b")

  leaves, structure = jax.tree_util.tree_flatten_with_path(layer)
  adapted = any(is_factor(path) for path, _ in leaves)
  trained = [not adapted or is_factor(path) for path, _ in leaves]
  x, late = backward_in_order((x, [y for (_, y), t in zip(leaves, trained, strict=True) if t]))
  late = iter(late)
  both = [next(late) if t else y for (_, y), t in zip(leaves, trained, strict=True)]
  return x, jax.tree.unflatten(structure, both)


def scan_layers(
  layer: Callable, x: Any, stacked: Any, windows: Sequence[int | None], unroll: int
) -> Any:
  """One scan for each run of layers that share a window, so that windows and ropes stay static."""
  start = 0
  for window, run in itertools.groupby(windows):
    stop = start + len(list(run))

    def body(x, layer_params, window=window):
      # A scan's body cannot be merged with its recomputation anyway.
      return layer(x, layer_params, None, window, prevent_cse=False)

    whole = start == 0 and stop == len(windows)
    part = stacked if whole else jax.tree.map(lambda p, s=start, e=stop: p[s:e], stacked)
    x, _ = jax.lax.scan(body, x, part, unroll=min(unroll, stop - start))
    start = stop
  return x
