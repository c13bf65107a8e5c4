"""Drafts "budget": a fixed number of tokens a row, shared out by what the drafts' chances say.

As in branches.py a pass verifies drafts and carries runs of noise for the places where the verified
text may end. But how many drafts are verified, and how long each run is, is chosen for each row in
each pass (allocation.py): a run behind a draft that hardly fails is short, or not there. In the
pass the drafts stand first, then the runs, then noise that nobody reads where tokens are left over.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from refine_jax.attention.cached import Reach
from refine_jax.batch import Batch
from refine_jax.decoding.drafts import allocation
from refine_jax.decoding.drafts.allocation import Allocation
from refine_jax.decoding.drafts.branches import BranchDrafts
from refine_jax.decoding.drafts.kind import Choose, Layout, Predicted, Rows
from refine_jax.hf.calibration import PLAIN, Calibration


@dataclasses.dataclass(frozen=True)
class BudgetDrafts(BranchDrafts):
  """Runs of noise where they are worth most, for `tokens` tokens a row (0: twice the block)."""

  tokens: int = 0
  calibration: Calibration = PLAIN

  budgeted = True
  reads_probability = True

  def set_up(self, budget: int, calibration: Calibration) -> Self:
    return dataclasses.replace(self, tokens=budget, calibration=calibration)

  def extra_tokens(self, block: int) -> int:
    return max((self.tokens or 2 * block) - block, 0)

  def allocate(self, rows: Rows, known_B: jax.Array, block: int, room_B: jax.Array) -> Allocation:
    """Shares out the tokens after the last committed one."""
    chance = self.calibration.chance(rows.probability, rows.samples)
    worth = self.calibration.worth(block - 1)
    return allocation.by_chance(chance, known_B, worth, room_B)

  def lay_out(self, window: Batch, reach: Reach, rows: Rows, block: int) -> Layout:
    batch, width = window.ids.shape
    tokens = width + self.extra_tokens(block)
    base = rows.base[:, None]
    known = jnp.clip(rows.known, 0, block - 1 - rows.base)
    drafts, runs, starts = self.allocate(rows, known, block, tokens - 1 - rows.base)
    clean = base + 1 + drafts[:, None]  # the window's tokens, which stand first
    index, firsts = jnp.arange(block), clean + starts
    order = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    past = order[:, :, None] - firsts[:, None, :]
    inside = (past >= 0) & (past < runs[:, None, :])  # [B, T, N], of one run at most

    def of_run(values):
      return jnp.sum(jnp.where(inside, values, 0), axis=2, dtype=jnp.int32)

    is_noise, in_run = order >= clean, jnp.any(inside, axis=2)
    first = of_run(firsts[:, None, :])
    upto = base + of_run(index[None, None, :])  # the last token that it takes for right
    offset = jnp.where(in_run, upto + 1 + order - first, base + 1)
    ids = jnp.pad(window.ids, ((0, 0), (0, tokens - width)))
    return Layout(
      Batch(
        ids=jnp.where(is_noise, rows.noise[:, None], ids),
        positions=window.positions[:, :1] + jnp.where(is_noise, offset, order),
        is_noise=is_noise,
      ),
      Reach(
        jnp.where(is_noise, upto, order),
        jnp.where(in_run, first, 0),
        jnp.where(in_run, order, -1),
      ),
      drafts,
      firsts,
      runs,
    )

  def predict(
    self, own: Predicted, verified_B: jax.Array, layout: Layout, choose: Choose
  ) -> tuple[Predicted, jax.Array]:
    return self.join(own, verified_B, layout, choose)

  def following(
    self,
    predicted: jax.Array,
    count_B: jax.Array,
    accepted_B: jax.Array,
    length_B: jax.Array,
    noise_B: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    there = jnp.arange(predicted.shape[1])[None, :] < count_B[:, None]
    return jnp.where(there, predicted, noise_B[:, None]), length_B + count_B


@dataclasses.dataclass(frozen=True)
class CycleDrafts(BudgetDrafts):
  """Two passes in turn, of a block of tokens each: one drafts, the next verifies.

  This is how the uno decoders of SGLang and vLLM, and Orthrus (arXiv:2605.12825), go on. With more
  `tokens` than a block, noise stands behind the last draft in the verifying pass as well.
  """

  reads_probability = False

  def extra_tokens(self, block: int) -> int:
    return max(self.tokens - block, 0)

  def allocate(self, rows: Rows, known_B: jax.Array, block: int, room_B: jax.Array) -> Allocation:
    return allocation.in_turn(known_B, block - 1, block - 1, room_B)
