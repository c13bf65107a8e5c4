"""Drafts "tail": what the last pass predicted after the tokens that it committed.

This is Jacobi decoding (Santilli et al. 2023, arXiv:2305.10427), where the sequence is cut into
blocks that move on with what was verified.
"""

import jax

from refine_jax.attention.cached import Reach
from refine_jax.batch import Batch
from refine_jax.decoding.drafts.kind import Choose, Predicted


class TailDrafts:
  """Keeps predictions in their place; adds nothing to a pass. Other kinds change parts of it."""

  needs_verifying = False

  def prompt_drafts(self, block: int) -> int:
    return block - 1

  def extra_tokens(self, block: int) -> int:
    return 0

  def extra_predictions(self, block: int) -> int:
    return 0

  def fill(
    self, tokens: jax.Array, drafted_B: jax.Array, length_B: jax.Array, block: int
  ) -> tuple[jax.Array, jax.Array]:
    return tokens, drafted_B

  def extend(
    self, window: Batch, reach: Reach, base_B: jax.Array, block: int, noise_B: jax.Array
  ) -> tuple[Batch, Reach]:
    return window, reach

  def predict(
    self,
    own: Predicted,
    verified_B: jax.Array,
    length_B: jax.Array,
    x_BTD: jax.Array,
    choose: Choose,
  ) -> Predicted:
    return own

  def may_commit(self, sure: jax.Array, verified_B: jax.Array, block: int) -> jax.Array:
    return sure

  def following(
    self, predicted: jax.Array, accepted_B: jax.Array, length_B: jax.Array, noise_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return predicted, length_B + predicted.shape[1]
