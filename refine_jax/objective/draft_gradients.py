"""The gradient of a gated adapter: drafts against what the frozen base says, or the text."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.batch import Batch
from refine_jax.objective.draft_blocks import DraftBlocks

# The name of the one term of the loss.
DRAFT = "draft"


def draft_gradients(
  draft_loss: Callable, factors: Any, batch: Batch, blocks: DraftBlocks
) -> tuple[Any, dict]:
  """The gradient of the weighted mean distance of all drafts, and sums for the metrics.

  Args:
    draft_loss: (factors, batch [B, T], blocks [B, Q], weights [B, Q]) -> (the sum of weight *
      distance, DraftOutput).
    factors: the adapter's parameters.
    batch, blocks: arrays [A, B, ..]; the loss is a mean over the drafts of all A.

  Returns:
    the gradient, float32, like factors; {"draft": rounds.ROUND_SUMS, float32 scalars}, where what
    is right is what the draft is compared with.
  """
  total = jnp.maximum(jnp.sum(blocks.weights), 1e-6)

  def body(gradients, micro):
    rows, drafts = micro

    def loss(factors):
      return draft_loss(factors, rows, drafts, drafts.weights / total)

    step_gradients, output = jax.grad(loss, has_aux=True)(factors)
    gradients = jax.tree.map(lambda a, g: a + g.astype(a.dtype), gradients, step_gradients)
    return gradients, draft_sums(drafts, output)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), factors)
  gradients, sums = jax.lax.scan(body, zeros, (batch, blocks))
  return gradients, {DRAFT: {name: jnp.sum(x) for name, x in sums.items()}}


def draft_sums(drafts: DraftBlocks, output: Any) -> dict:
  """rounds.ROUND_SUMS of the drafts of one batch [B, Q], float32 scalars.

  Args:
    output: draft_head.DraftOutput of these drafts.
  """
  scored = drafts.weights > 0
  right = scored & (output.predictions == output.references)
  return {
    "loss": jnp.sum(output.losses * drafts.weights),
    "count": jnp.sum(drafts.weights),
    "corrupted": jnp.sum(scored, dtype=jnp.float32),
    "corrupted_right": jnp.sum(right, dtype=jnp.float32),
    # Every draft token is noise.
    "clean": jnp.zeros(()),
    "clean_right": jnp.zeros(()),
  }
