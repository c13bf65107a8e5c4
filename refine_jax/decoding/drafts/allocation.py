"""How a pass of a fixed number of tokens is shared out between drafts and runs of noise.

A row comes to a pass with drafts, each with the chance that it is right where those before it are.
The pass may verify the first d of them, and spends its other tokens on runs of noise: run j stands
for "j drafts are right" and gives as many drafts for the next pass as it is long. With S(j) the
product of the first j chances, the row ends up in run j < d with the chance S(j) (1 - chance(j+1)),
and in run d with S(d). A verified draft adds S(j) tokens to this pass, and token l of run j adds
its chance times worth(l) to later ones, where worth(l), which falls with l, is the chance that an
l-th draft is accepted. d is how many drafts are among the K - 1 best of both; then the runs are
shared out anew, with the chances that d gives them.

Chances are those of the drafts' own distribution: nothing here depends on what the pass will say of
them. DSpark (arXiv:2607.05147) shares a budget out by survival likewise, between rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Allocation(NamedTuple):
  """What a pass does with a row's tokens after the last committed one.

  Attributes:
    drafts: int32 [B], how many are verified: the first ones.
    runs: int32 [B, D + 1], the length of the run of noise for each number of right drafts.
    starts: int32 [B, D + 1], the lengths of all runs before it.
  """

  drafts: jax.Array
  runs: jax.Array
  starts: jax.Array


def by_chance(
  chance_BD: jax.Array, known_B: jax.Array, worth_L: jax.Array, room_B: jax.Array
) -> Allocation:
  """Shares a pass out by what each token is worth.

  Args:
    chance_BD: float32, that a draft is right where those before it are.
    known_B: int32, how many drafts there are.
    worth_L: float32, falling, of each token of a run; no run is longer.
    room_B: int32, tokens to be shared out; some are left where runs and drafts need fewer.
  """
  most, longest = chance_BD.shape[1], len(worth_L)
  run = jnp.arange(most + 1)[None, :]
  chance = jnp.where(run[:, :most] < known_B[:, None], jnp.minimum(chance_BD, 1.0), 0.0)
  # Products and sums over masks, here and below, are one kernel each; scans and sorts are several.
  before = run[0, None, :most] < run[0, :, None]
  survives = jnp.prod(jnp.where(before[None], chance[:, None, :], 1.0), axis=2)
  ends = survives * (1 - jnp.pad(chance, ((0, 0), (0, 1))))

  def gains(ends):
    return (ends[:, :, None] * worth_L[None, None, :]).reshape(len(ends), -1)

  # Survival falls, so as many drafts stand before a draft as there are; runs stand behind equals.
  better = gains(ends)[:, None, :] > survives[:, 1:, None]
  place = run[:, :most] + jnp.sum(better, axis=2, dtype=jnp.int32)
  drafts = jnp.sum(place < room_B[:, None], axis=1, dtype=jnp.int32)
  drafts = jnp.minimum(drafts, known_B)
  last = drafts[:, None]
  ends = jnp.where(run == last, survives, jnp.where(run < last, ends, 0.0))
  taken = _among_best(gains(ends), room_B - drafts)
  own = jnp.repeat(run[0], longest)
  taken = (taken & (own[None, :] <= last))[:, None, :]

  def count(of):
    return jnp.sum(taken & of[None], axis=2, dtype=jnp.int32)

  each = run[0, :, None]
  return Allocation(drafts, count(own[None, :] == each), count(own[None, :] < each))


def _among_best(values_Bn, count_B):
  """Which values are among the largest: bool [B, n]; the first of equals before the others."""
  order = jnp.arange(values_Bn.shape[1])
  mine, other = values_Bn[:, :, None], values_Bn[:, None, :]
  earlier = order[None, None, :] < order[None, :, None]
  before = (other > mine) | ((other == mine) & earlier)
  return jnp.sum(before, axis=2, dtype=jnp.int32) < count_B[:, None]


def in_turn(known_B: jax.Array, most: int, longest: int, room_B: jax.Array) -> Allocation:
  """Verifies all drafts that there are; noise stands behind the last, where tokens are left."""
  drafts = jnp.minimum(known_B, most)
  left = jnp.clip(room_B - drafts, 0, longest)
  run = jnp.arange(most + 1)[None, :]
  runs = jnp.where(run == drafts[:, None], left[:, None], 0)
  return Allocation(drafts, runs, jnp.where(run > drafts[:, None], left[:, None], 0))
