"""What a draft kind is."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax

from refine_jax.attention.cached import Reach
from refine_jax.batch import Batch
from refine_jax.hf.calibration import Calibration


class Predicted(NamedTuple):
  """What a pass predicts for the offsets from a row's length on.

  Attributes:
    tokens: int32 [B, n].
    probability: float32 [B, n], of each token in the distribution that it was chosen from.
  """

  tokens: jax.Array
  probability: jax.Array


class Rows(NamedTuple):
  """What a kind may know of the rows when it lays out a pass.

  Attributes:
    base: int32 [B], where in the window the last committed token stands.
    noise: int32 [B], the rows' noise tokens.
    known: int32 [B], how many drafts follow it that are predictions.
    probability: float32 [B, N - 1], of each draft in the distribution that it was chosen from.
    samples: bool [B], whether the row has a temperature.
  """

  base: jax.Array
  noise: jax.Array
  known: jax.Array
  probability: jax.Array
  samples: jax.Array


class Layout(NamedTuple):
  """What a pass runs over.

  Attributes:
    batch: ids, positions and is_noise [B, T].
    reach: who sees whom.
    drafts: int32 [B], how many of the window's drafts may be verified.
    first, count: int32 [B, N], where the run of noise stands whose predictions go on after so many
      right drafts, and how long it is; None where there are no runs.
  """

  batch: Batch
  reach: Reach
  drafts: jax.Array
  first: jax.Array | None = None
  count: jax.Array | None = None


# order_Bn -> Predicted: the tokens after those of the pass at these places.
Choose = Callable[[jax.Array], Predicted]


class DraftKind(Protocol):
  """Where the drafts that a pass verifies come from.

  A pass runs over a window of each row: tokens not in the cache yet, the last committed one, and
  block - 1 drafts after it. A kind may write other drafts there, add tokens after the window, and
  decides what stands there for the next pass. Counts are for a block of N tokens, N > 1. Kinds
  have no state, and their methods are part of the compiled pass.

  Attributes:
    needs_verifying: whether the kind is of no use to a mode that verifies no drafts ("fixed").
    budgeted: whether Options.budget says how many tokens a pass has; such a kind serves mode
      "exact" alone.
    reads_probability: whether it needs those of the drafts.
  """

  needs_verifying: bool
  budgeted: bool
  reads_probability: bool

  def set_up(self, budget: int, calibration: Calibration) -> "DraftKind":
    """The kind for passes of so many tokens a row (0: its default), and a model's calibration."""
    ...

  def prompt_drafts(self, block: int) -> int:
    """Counts the drafts that the prompt's pass makes for the first one."""
    ...

  def extra_tokens(self, block: int) -> int:
    """Counts the tokens a row that a pass runs over after its window."""
    ...

  def extra_predictions(self, block: int) -> int:
    """Counts the predictions that these may add to the N of the window."""
    ...

  def fill(
    self, tokens: jax.Array, drafted_B: jax.Array, length_B: jax.Array, block: int
  ) -> tuple[jax.Array, jax.Array]:
    """Writes drafts for this pass.

    Args:
      tokens: int32 [B, S], the rows.
      drafted_B: int32, the position from which on a row holds noise tokens.
      length_B: int32, the position of the first draft.

    Returns:
      tokens and drafted_B with the new drafts.
    """
    ...

  def lay_out(self, window: Batch, reach: Reach, rows: Rows, block: int) -> Layout:
    """Adds the extra tokens to a pass, and says who sees whom.

    Args:
      window: ids, positions and is_noise of the window [B, W].
      reach: who sees whom in it.
    """
    ...

  def predict(
    self, own: Predicted, verified_B: jax.Array, layout: Layout, choose: Choose
  ) -> tuple[Predicted, jax.Array]:
    """Joins what the window predicts [B, N] with what the extra tokens do.

    Args:
      verified_B: int32, how many of the window's drafts are right.

    Returns:
      [B, N + extra_predictions]: those after the first verified + 1 are guesses; and int32 [B], how
      many of the leading ones mean anything.
    """
    ...

  def may_commit(self, sure: jax.Array, verified_B: jax.Array, block: int) -> jax.Array:
    """Says which predictions "threshold" may commit.

    Args:
      sure: bool [B, N + extra_predictions], whose probability is high enough.
    """
    ...

  def following(
    self,
    predicted: jax.Array,
    count_B: jax.Array,
    accepted_B: jax.Array,
    length_B: jax.Array,
    noise_B: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Decides what stands from position length on for the next pass.

    Args:
      predicted: int32 [B, n], this pass's predictions, the first `accepted` of them committed.
      count_B: int32, how many of them `predict` says mean anything.
      noise_B: int32, the rows' noise tokens.

    Returns:
      int32 [B, n]; and int32 [B], the position from which on a row holds noise tokens then.
    """
    ...
