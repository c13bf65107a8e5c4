"""What a draft kind is."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax

from refine_jax.attention.cached import Reach
from refine_jax.batch import Batch


class Predicted(NamedTuple):
  """What a pass predicts for the offsets from a row's length on.

  Attributes:
    tokens: int32 [B, n].
    probability: float32 [B, n], of each token in the distribution that it was chosen from.
  """

  tokens: jax.Array
  probability: jax.Array


# (hidden states x_BnD, first_B) -> Predicted: the tokens after these, where the first predicted one
# stands at position first_B of its row.
Choose = Callable[[jax.Array, jax.Array], Predicted]


class DraftKind(Protocol):
  """Where the drafts that a pass verifies come from.

  A pass runs over a window of each row: tokens not in the cache yet, the last committed one, and
  block - 1 drafts after it. A kind may write other drafts there, add tokens after the window, and
  decides what stands there for the next pass. Counts are for a block of N tokens, N > 1. Kinds
  have no state, and their methods are part of the compiled pass.

  Attributes:
    needs_verifying: whether the kind is of no use to a mode that verifies no drafts ("fixed").
  """

  needs_verifying: bool

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

  def extend(
    self, window: Batch, reach: Reach, base_B: jax.Array, block: int, noise_B: jax.Array
  ) -> tuple[Batch, Reach]:
    """Adds the extra tokens to a pass, and says who sees whom.

    Args:
      window: ids, positions and is_noise of the window [B, W].
      reach: who sees whom in it.
      base_B: int32, where in the window the last committed token stands.
      noise_B: int32, the rows' noise tokens.
    """
    ...

  def predict(
    self,
    own: Predicted,
    verified_B: jax.Array,
    length_B: jax.Array,
    x_BTD: jax.Array,
    choose: Choose,
  ) -> Predicted:
    """Joins what the window predicts [B, N] with what the extra tokens do.

    Args:
      verified_B: int32, how many of the window's drafts are right.
      length_B: int32, the position of the first predicted token.
      x_BTD: hidden states of all tokens of the pass.

    Returns:
      [B, N + extra_predictions]: those after the first verified + 1 are guesses.
    """
    ...

  def may_commit(self, sure: jax.Array, verified_B: jax.Array, block: int) -> jax.Array:
    """Says which predictions "threshold" may commit.

    Args:
      sure: bool [B, N + extra_predictions], whose probability is high enough.
    """
    ...

  def following(
    self, predicted: jax.Array, accepted_B: jax.Array, length_B: jax.Array, noise_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Decides what stands from position length on for the next pass.

    Args:
      predicted: int32 [B, n], this pass's predictions, the first `accepted` of them committed.
      noise_B: int32, the rows' noise tokens.

    Returns:
      int32 [B, n]; and int32 [B], the position from which on a row holds noise tokens then.
    """
    ...
