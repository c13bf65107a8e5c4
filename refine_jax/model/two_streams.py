"""Clean text and its drafts as two streams through the layers of a frozen base.

Clean tokens never see a noise token, and a gated adapter does nothing to them. So the clean stream
runs forward alone, once, and hands its keys and values over layer by layer. Noise tokens run
forward and backward, for activations and the adapter's factors alone: for N parameters 6 N FLOPs
per token, where training all weights on text and drafts takes 12 N.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from refine_jax.batch import Batch
from refine_jax.model import adapters
from refine_jax.model import remat as remat_lib
from refine_jax.model.config import ModelConfig
from refine_jax.model.layer import Attend, Constrain, Layer, anywhere, norm
from refine_jax.model.transformer import backward_in_order, embed, rotations, scan_layers


def hidden_states(
  params: dict,
  factors: dict,
  config: ModelConfig,
  clean: Batch,
  drafts: Batch,
  clean_attend_with: Callable[[int | None], Attend],
  draft_attend_with: Callable[[int | None], Attend],
  *,
  dtype: DTypeLike = jnp.float32,
  remat: str = "none",
  unroll: int = 1,
  constrain: Constrain = anywhere,
) -> tuple[jax.Array, jax.Array]:
  """Runs both streams up to the final norm.

  Args:
    params: of the base, in a form of layout.py; they get no gradient.
    factors: adapters.working_copy, layers stacked, or in a list where those of `params` are.
    clean: tokens [B, T]; ids and positions are read here.
    drafts: noise tokens [B, Q], likewise.
    clean_attend_with: gives the attention of the clean stream for a sliding window.
    draft_attend_with: that of the drafts, whose `cache` is the clean stream's (keys, values) of
      the same layer, [B, T, K, h].
    dtype, unroll, constrain: as in transformer.hidden_states.
    remat: one of remat.POLICIES, for the drafts; of the clean stream keys and values are kept.

  Returns:
    hidden states in `dtype`: [B, T, D] of the clean tokens, [B, Q, D] of the drafts.
  """
  params = jax.lax.stop_gradient(params)
  module = Layer(config)
  clean_rotation, draft_rotation = (rotations(config, x.positions) for x in (clean, drafts))

  def layer(xs, layer_and_factors, cache, window, prevent_cse=True):
    (x, draft_x), (weights, change) = xs, layer_and_factors

    def keep(q, k, v, cache, scale=None):
      return clean_attend_with(window)(q, k, v, cache, scale)[0], (k, v)

    x, keys_values = module.apply({"params": weights}, x, clean_rotation(window), keep)

    def run(draft_x, change, keys_values):
      attached = adapters.attach_layer(weights, change, config)
      attend, rotation = draft_attend_with(window), draft_rotation(window)
      return module.apply({"params": attached}, draft_x, rotation, attend, keys_values, True)[0]

    if remat != "none":
      run = jax.checkpoint(run, policy=remat_lib.policy(remat), prevent_cse=prevent_cse)
    return (
      constrain(x, "residual"),
      constrain(run(draft_x, change, keys_values), "residual"),
    ), cache

  xs = tuple(constrain(embed(params, config, x.ids, dtype), "residual") for x in (clean, drafts))
  layers, changes = params["layers"], factors["layers"]
  if isinstance(layers, list):
    for weights, change, window in zip(layers, changes, config.windows, strict=True):
      draft_x, change = backward_in_order((xs[1], change))
      xs, _ = layer((xs[0], draft_x), (weights, change), None, window)
  else:
    xs = scan_layers(layer, xs, (layers, changes), config.windows, unroll)

  def finish(x: jax.Array) -> Any:
    return norm(config).apply({"params": params["final_norm"]}, x)

  return finish(xs[0]), finish(xs[1])
