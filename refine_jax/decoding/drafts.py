"""Where drafts come from, other than from the last pass over the same places.

N-grams: as the text went on where it said the same before.

Branches: drafts for every place where the verified run may end, in the pass that verifies. A pass
verifies N - 1 drafts and so learns where its text ends only when it is over; what it predicted
behind a wrong draft was made from that draft. So each pass also carries N branches: branch j stands
for "j drafts are right", sees the text up to the j-th of them, and holds N - 1 noise tokens in the
places after it, as training shows them (noise.blocks_beside). Whatever the pass verifies, one
branch has drafts for what comes next. This is the quadratic decoding of Samragh et al. 2025
(arXiv:2507.11851), with a run of noise for their mask tokens.

The branches' keys and values lie in the cache behind those of the window, where the next pass
overwrites them.
"""

import jax.numpy as jnp

from refine_jax.attention import cached
from refine_jax.attention.cached import slice_rows, write_rows


def continue_ngrams(tokens, length, block):
  """Drafts as the text went on after the last earlier place with its last two tokens.

  Where there is none, the drafts stay as they are (prompt lookup, Saxena 2023).
  """
  index = jnp.arange(tokens.shape[1] - 1)[None, :]
  last = slice_rows(tokens, jnp.maximum(length - 2, 0), 2)
  same = (tokens[:, :-1] == last[:, :1]) & (tokens[:, 1:] == last[:, 1:])
  place = jnp.max(jnp.where(same & (index < length[:, None] - 2), index, -1), axis=1)
  # Read one by one, because a short period runs into its own continuation.
  period = length - 2 - place
  offsets = jnp.arange(block)[None, :] % jnp.maximum(period, 1)[:, None]
  found = jnp.take_along_axis(tokens, jnp.maximum(place, 0)[:, None] + 2 + offsets, axis=1)
  return jnp.where((place >= 0)[:, None], write_rows(tokens, found, length), tokens)


def branch_tokens(block: int) -> int:
  """Tokens of all branches of a pass."""
  return block * (block - 1)


def following(start_B, base_B, window: int, block: int) -> tuple:
  """As cached.following, of a window's tokens and of the branches behind them.

  Args:
    start_B: int32, the window's first position.
    base_B: int32, where in its window each row's last committed token stands.
  """
  positions, plain = cached.following(start_B, window)
  branch, place = jnp.divmod(jnp.arange(branch_tokens(block)), block - 1)
  ends = base_B[:, None] + branch[None]  # the last token that the branch takes for right
  behind = start_B[:, None] + ends + 1 + place[None]
  first = window + branch * (block - 1)
  reach = cached.Reach(
    jnp.concatenate([plain.upto, ends], axis=1),
    jnp.concatenate([plain.first, first]),
    jnp.concatenate([plain.last, first + place]),
  )
  return jnp.concatenate([positions, behind], axis=1), reach


def chosen(x_BTD, verified_B, window: int, block: int):
  """Hidden states [B, N - 1, D] of the branch that stands for what was verified."""
  return slice_rows(x_BTD, window + verified_B * (block - 1), block - 1)


def continued(block_BN, ahead, verified_B):
  """The verified run with the token after it, then the branch's: [B, 2 N - 1].

  Args:
    block_BN: of the window's predictions.
    ahead: [B, N - 1], the same of the chosen branch's.
  """
  width = block_BN.shape[1] + ahead.shape[1]
  index = jnp.arange(width)[None, :]
  own = jnp.take_along_axis(block_BN, jnp.minimum(index, block_BN.shape[1] - 1), axis=1)
  place = jnp.clip(index - verified_B[:, None] - 1, 0, ahead.shape[1] - 1)
  return jnp.where(index <= verified_B[:, None], own, jnp.take_along_axis(ahead, place, axis=1))
