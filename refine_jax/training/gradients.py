"""The gradient of a step: of rounds over noised rows, or of draft blocks next to clean rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from refine_jax.batch import Batch
from refine_jax.objective import draft_blocks
from refine_jax.objective import noise as noise_lib
from refine_jax.objective import plan as plan_lib
from refine_jax.objective import rounds as objective
from refine_jax.objective.draft_gradients import DRAFT, draft_gradients, draft_sums
from refine_jax.training.forward import ForwardConfig
from refine_jax.training.step_config import StepConfig


def of_rounds(
  params: dict,
  batch: Batch,
  frozen: dict | None,
  key: jax.Array,
  step_config: StepConfig,
  forward: ForwardConfig,
) -> tuple[dict, dict, jax.Array]:
  """The gradient of all rounds (objective.rounds).

  Args:
    params: what is trained: all weights, or the factors of an adapter.
    batch: arrays [A, B, T].
    frozen: the base of an adapter.
    key: for the noise of this step.

  Returns:
    the gradient, float32, like params; for each term objective.ROUND_SUMS; how many tokens were
    noised.
  """
  batch, noised = jax.vmap(
    lambda micro: noise_lib.add_noise(key, micro, step_config.noise, step_config.noise_token)
  )(batch)

  # One turn alone sums each layer's gradient while the layer before it is computed.
  once = batch.ids.shape[0] * plan_lib.passes(step_config.plan) > 1 and forward.splits_rows
  inner = forward.inside() if once else forward

  def adapted_loss(factors, *arguments):
    return inner.loss(inner.working(factors, frozen), *arguments)

  loss: Callable = inner.loss if forward.adapter is None else adapted_loss
  trained = forward.cast(params) if forward.adapter is None else params
  gradients, sums = objective.refinement_gradients(
    loss,
    trained,
    batch,
    noised,
    step_config.plan,
    *((forward.summed_once,) if once else ()),
  )
  if forward.adapter is None:
    gradients = forward.canonical(gradients)
  return gradients, sums, jnp.sum(noised.rates * batch.response_mask)


def of_drafts(
  params: dict,
  batch: Batch,
  frozen: dict | None,
  key: jax.Array,
  step_config: StepConfig,
  forward: ForwardConfig,
) -> tuple[dict, dict, jax.Array]:
  """The gradient of a gated adapter.

  Arguments and results are those of `of_rounds`; the last one is how many drafts are scored.
  """
  blocks = jax.vmap(lambda micro: _draw(key, micro, step_config, forward))(batch)
  loss = _draft_loss(frozen, step_config, forward)
  gradients, sums = draft_gradients(loss, params, batch, blocks)
  return gradients, sums, sums[DRAFT]["corrupted"]


def sums_of_drafts(
  params: dict,
  batch: Batch,
  frozen: dict | None,
  key: jax.Array,
  step_config: StepConfig,
  forward: ForwardConfig,
) -> dict:
  """What `of_drafts` says of the loss of one batch [B, T], without a gradient."""
  blocks = _draw(key, batch, step_config, forward)
  loss = _draft_loss(frozen, step_config, forward)
  _, output = loss(params, batch, blocks, blocks.weights)
  return {DRAFT: draft_sums(blocks, output)}


def _draw(key, batch, step_config, forward):
  noise = step_config.noise
  return draft_blocks.draw(
    key,
    batch,
    anchors=noise.anchors,
    drafts=noise.block_size - 1,
    noise_token=step_config.noise_token,
    random_below=forward.model.vocab_size if noise.random else 0,
    decay=noise.offset_decay,
    most=step_config.most_tiles,
  )


def _draft_loss(frozen, step_config, forward) -> Callable:
  assert frozen is not None
  size, target = step_config.noise.block_size - 1, step_config.objective.draft_target

  def loss(factors, rows, drafts, weights):
    return forward.draft_loss(factors, frozen, rows, drafts, weights, drafts=size, target=target)

  return loss
