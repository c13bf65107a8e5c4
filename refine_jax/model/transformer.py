"""One causal decoder. What differs between families of models is a field of ModelConfig.

Flax Linen defines one layer; the stack is a `lax.scan` over layers whose parameters carry a
leading layer axis (or a plain loop, where the parameters come as a list of layers). Everything
outside this file sees pure functions on nested dicts of arrays.

Legend, used in names throughout the project:
  B batch, T length, D width, H query heads, K key/value heads, h head width, F feed-forward
  width, V vocabulary, L layers, N tokens in a flat list or a block.
"""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from refine_jax.batch import Batch
from refine_jax.model import remat as remat_lib
from refine_jax.model import rope as rope_lib
from refine_jax.model.config import ModelConfig

ACTIVATIONS: dict[str, Callable] = {
  "silu": nn.silu,
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}

# Attend: (q [B,T,H,h], k [B,T,K,h], v [B,T,K,h], cache, scale=None) -> (out [B,T,H,h], cache).
Attend = Callable[..., tuple]


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, computed in float32 (arXiv:1910.07467).

  Attributes:
    offset: multiplies by 1 + scale instead, with a scale that starts at zero.
  """

  eps: float
  offset: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.offset else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],))
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    if self.offset:
      scale = 1 + scale.astype(jnp.float32)
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


def norm(config: ModelConfig, name: str | None = None) -> RMSNorm:
  """The kind of norm that a model has everywhere."""
  return RMSNorm(config.norm_eps, config.norm_offset, name=name)


def _dense(config: ModelConfig, features: int, bias: bool, dtype, name: str):
  init = nn.initializers.normal(config.initializer_range)
  return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, name=name)


class Attention(nn.Module):
  """Grouped-query attention (arXiv:2305.13245) around an engine that the caller gives."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, rotation, attend: Attend, cache=None):
    c, dtype = self.config, x_BTD.dtype

    def project(name, heads):
      y = _dense(c, heads * c.head_dim, c.qkv_bias, dtype, name)(x_BTD)
      return y.reshape(*y.shape[:-1], heads, c.head_dim)

    if self.has_variable("params", "qkv"):  # layout.join_projections
      joined = project("qkv", c.heads + 2 * c.kv_heads)
      q, k, v = jnp.split(joined, [c.heads, c.heads + c.kv_heads], axis=-2)
    else:
      q, k = project("query", c.heads), project("key", c.kv_heads)
      v = project("value", c.kv_heads)
    if c.qk_norm:
      q, k = norm(c, "query_norm")(q), norm(c, "key_norm")(k)
    q = checkpoint_name(rope_lib.rotate(q, *rotation), "query")
    k = checkpoint_name(rope_lib.rotate(k, *rotation), "key")
    v = checkpoint_name(v, "value")
    out, cache = attend(q, k, v, cache, scale=c.attention_scale)
    out = checkpoint_name(out, "attention")
    out = out.reshape(*out.shape[:-2], c.heads * c.head_dim)
    return _dense(c, c.width, c.output_bias, dtype, "output")(out), cache


class MLP(nn.Module):
  """A gated MLP such as SwiGLU or GeGLU (arXiv:2002.05202)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    c, dtype = self.config, x.dtype

    def project(name, width):
      return checkpoint_name(_dense(c, width, c.mlp_bias, dtype, name)(x), name)

    if self.has_variable("params", "gate_up"):  # layout.join_projections
      gate, up = jnp.split(project("gate_up", 2 * c.feed_forward), 2, axis=-1)
    else:
      gate, up = project("gate", c.feed_forward), project("up", c.feed_forward)
    return _dense(c, c.width, c.mlp_bias, dtype, "down")(ACTIVATIONS[c.activation](gate) * up)


class Layer(nn.Module):
  """Attention and MLP, each after a norm and added to the residual stream."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, rotation, attend: Attend, cache=None):
    c = self.config
    with jax.named_scope("attention"):
      y = norm(c, "attention_norm")(x_BTD)
      y, cache = Attention(c, name="attention")(y, rotation, attend, cache)
      x_BTD = x_BTD + (norm(c, "attention_post_norm")(y) if c.post_norms else y)
    with jax.named_scope("mlp"):
      y = MLP(c, name="mlp")(norm(c, "mlp_norm")(x_BTD))
      x_BTD = x_BTD + (norm(c, "mlp_post_norm")(y) if c.post_norms else y)
    return x_BTD, cache


def init_params(config: ModelConfig, key) -> dict:
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


def head_matrix(params: dict):
  """The output head [V, D]: its own, or the embedding where they are tied."""
  return params.get("head", params["embedding"])


def logits(params: dict, x):
  """Of hidden states [.., D], multiplied in their dtype: float32 [.., V]."""
  head = head_matrix(params).astype(x.dtype)
  return jnp.einsum("...d,vd->...v", x, head, preferred_element_type=jnp.float32)


def cast_for_compute(params: dict, dtype) -> dict:
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
  dtype=jnp.float32,
  remat: str = "none",
  unroll: int = 1,
  backward_slack: int = 0,
  constrain: Callable = lambda x: x,
  caches: list | None = None,
):
  """Runs the decoder up to its final norm.

  Args:
    params: as `init_params` makes them, or in a form of layout.py.
    batch: the tokens [B, T]; their ids and positions are read here.
    attend_with: gives the attention engine for a sliding window (None: no window).
    dtype: of the activations.
    remat: one of remat.POLICIES.
    unroll: layers in each turn of the scan; without meaning for a list of layers.
    backward_slack: of a list of layers: by how many layers the gradients of weights may be late.
    constrain: applied to the residual stream, to pin its sharding.
    caches: one attention cache a layer; only with a list of layers.

  Returns:
    hidden states [B, T, D] in `dtype`; with `caches`, also the list of new ones.
  """
  x = constrain(_embed(params, config, batch.ids, dtype))
  rotation_with = _rotations(config, batch.positions)

  def layer(x, layer_params, cache, window, prevent_cse=True):
    def run(x, layer_params, cache):
      module = Layer(config)
      rotation, attend = rotation_with(window), attend_with(window)
      x, cache = module.apply({"params": layer_params}, x, rotation, attend, cache)
      return constrain(x), cache

    if remat != "none":
      run = jax.checkpoint(run, policy=remat_lib.policy(remat), prevent_cse=prevent_cse)
    return run(x, layer_params, cache)

  if isinstance(params["layers"], list):
    layers, new_caches = list(params["layers"]), caches and list(caches)
    for i in range(len(layers)):
      late = i + backward_slack
      if late < len(layers):
        x, layers[late] = _backward_in_order((x, layers[late]))
      x, cache = layer(x, layers[i], caches and caches[i], config.windows[i])
      if caches:
        new_caches[i] = cache
  else:
    assert caches is None, "a cache needs a list of layers"
    new_caches = None
    x = _scan_layers(layer, x, params["layers"], config.windows, unroll)
  x = norm(config).apply({"params": params["final_norm"]}, x)
  return x if caches is None else (x, new_caches)


def _embed(params, config, ids_BT, dtype):
  x = jnp.take(params["embedding"], ids_BT, axis=0).astype(dtype)
  return x if config.embedding_scale is None else x * jnp.asarray(config.embedding_scale, dtype)


def _rotations(config, positions_BT):
  """Window of a layer -> its (cos, sin); each rope's angles are computed once."""
  rotation = rope_lib.rotation(config.rope, config.head_dim, positions_BT)
  if config.sliding_rope is None:
    return lambda window: rotation
  sliding = rope_lib.rotation(config.sliding_rope, config.head_dim, positions_BT)
  return lambda window: rotation if window is None else sliding


# The identity, whose gradients wait for one another. Without it XLA puts off to the end what gives
# the weights' gradients, and keeps what that needs of nearly all layers.
_backward_in_order = jax.custom_vjp(lambda tree: tree)
_backward_in_order.defvjp(
  lambda tree: (tree, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)


def _scan_layers(layer, x, stacked, windows, unroll):
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
