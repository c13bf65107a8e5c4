"""Forms of one model's parameters.

The canonical form, of the optimizer, checkpoints and exports: layers stacked [L, ...], each
projection a matrix of its own. Computing is faster in others, which `hidden_states` takes too:

  unstacked  "layers" is a list with one dict per layer. No slices of stacked weights, which are
             copies for a decoder, and no gradients stacked anew in every round.
  joined     query, key and value are one matrix "qkv", gate and up one "gate_up", side by side on
             the last axis: fewer and larger products. XLA joins such products of its own accord,
             and then the weights too, in every pass.

`canonical` undoes both, for gradients too, as both only move numbers.
"""

import jax
import jax.numpy as jnp

from refine_jax.model.config import ModelConfig

# module -> (joined projection, its parts in order)
JOINED = {"attention": ("qkv", ("query", "key", "value")), "mlp": ("gate_up", ("gate", "up"))}
MODULES = tuple(JOINED)


def unstack_layers(params: dict) -> dict:
  """Turns stacked layers into a list with one dict per layer; leaves a list as it is."""
  if isinstance(params["layers"], list):
    return params
  count = jax.tree.leaves(params["layers"])[0].shape[0]
  layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)]
  return params | {"layers": layers}


def join_projections(params: dict, modules: tuple[str, ...] = MODULES) -> dict:
  """Joins the projections of these modules, in stacked or unstacked layers, where they are not."""
  return _map_layers(lambda layer: _join_layer(layer, modules), params)


def decoding_form(params: dict) -> dict:
  """Unstacks and joins in one compiled call; what has that form already stays the same array."""
  leaves, structure = jax.tree.flatten(params)
  origins, formed = [], structure

  def changed(leaves):
    nonlocal formed
    form = join_projections(unstack_layers(jax.tree.unflatten(structure, leaves)))
    results, formed = jax.tree.flatten(form)
    numbers = {id(x): i for i, x in enumerate(leaves)}
    origins[:] = [numbers.get(id(x)) for x in results]
    return [x for x in results if id(x) not in numbers]

  # A jitted function copies even what it only hands through.
  new = iter(jax.jit(changed)(leaves))
  both = [next(new) if i is None else jnp.asarray(leaves[i]) for i in origins]
  return jax.tree.unflatten(formed, both)


def canonical(params: dict, config: ModelConfig) -> dict:
  """Parameters or gradients of any form in the canonical one, dtypes as they are."""
  # Split first: a stack of parts reads each layer's joined matrix once, in one copy.
  params = _map_layers(lambda layer: _split_layer(layer, config), params)
  if isinstance(params["layers"], list):
    params = params | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])}
  return params


def _map_layers(function, params: dict) -> dict:
  layers = params["layers"]
  mapped = list(map(function, layers)) if isinstance(layers, list) else function(layers)
  return params | {"layers": mapped}


def _join_layer(layer: dict, modules) -> dict:
  result = dict(layer)
  for module in modules:
    joined, parts = JOINED[module]
    if joined in layer[module]:
      continue
    rest = {name: x for name, x in layer[module].items() if name not in parts}
    matrices = [layer[module][name] for name in parts]
    result[module] = rest | {
      joined: jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *matrices)
    }
  return result


def _split_layer(layer: dict, config: ModelConfig) -> dict:
  query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
  ends = {"qkv": [query, query + key], "gate_up": [config.feed_forward]}
  result = dict(layer)
  for module, (joined, parts) in JOINED.items():
    if joined not in layer[module]:
      continue
    rest = {name: x for name, x in layer[module].items() if name != joined}
    pieces = {
      leaf: jnp.split(x, ends[joined], axis=-1) for leaf, x in layer[module][joined].items()
    }
    result[module] = rest | {
      name: {leaf: xs[i] for leaf, xs in pieces.items()} for i, name in enumerate(parts)
    }
  return result
