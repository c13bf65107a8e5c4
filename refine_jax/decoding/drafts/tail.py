"""Drafts "tail": what the last pass predicted after the tokens that it committed.

This is Jacobi decoding (Santilli et al. 2023, arXiv:2305.10427), where the sequence is cut into
blocks that move on with what was verified.
"""

from typing import Self

import jax
import jax.numpy as jnp

from refine_jax.attention.cached import Reach
from refine_jax.batch import Batch
from refine_jax.decoding.drafts.kind import Choose, Layout, Predicted, Rows
from refine_jax.hf.calibration import Calibration


class TailDrafts:
  """Keeps predictions in their place; adds nothing to a pass. Other kinds change parts of it."""

  needs_verifying = False
  budgeted = False
  reads_probability = False

  def set_up(self, budget: int, calibration: Calibration) -> Self:
    return self

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

  def lay_out(self, window: Batch, reach: Reach, rows: Rows, block: int) -> Layout:
    return Layout(window, reach, jnp.full_like(rows.base, block - 1))

  def predict(
    self, own: Predicted, verified_B: jax.Array, layout: Layout, choose: Choose
  ) -> tuple[Predicted, jax.Array]:
    return own, jnp.full_like(verified_B, own.tokens.shape[1])

  def may_commit(self, sure: jax.Array, verified_B: jax.Array, block: int) -> jax.Array:
    return sure

  def following(
    self,
    predicted: jax.Array,
    count_B: jax.Array,
    accepted_B: jax.Array,
    length_B: jax.Array,
    noise_B: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    return predicted, length_B + count_B
