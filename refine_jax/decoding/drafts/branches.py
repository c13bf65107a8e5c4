"""Drafts "branches": for every length that the verified text may have, in the pass that verifies.

A pass verifies N - 1 drafts and so learns where its text ends only when it is over; what it
predicted after a wrong draft was made from that draft. So each pass also carries N branches: branch
j stands for "j drafts are right", sees the text up to the j-th of them, and holds N - 1 noise
tokens at the positions after it, as training shows them (objective/noise/block.py). Whatever the
pass verifies, one branch has drafts for what comes next. This is the quadratic decoding of Samragh
et al. 2025 (arXiv:2507.11851), with a run of noise for their mask tokens.

The branches' keys and values lie in the cache after those of the window, where the next pass
overwrites them.
"""

import jax
import jax.numpy as jnp

from refine_jax.attention.cached import Reach, slice_rows
from refine_jax.batch import Batch
from refine_jax.decoding.drafts.kind import Choose, Predicted
from refine_jax.decoding.drafts.tail import TailDrafts


class BranchDrafts(TailDrafts):
  """Adds N branches of N - 1 noise tokens; predictions go on in the branch that came true."""

  needs_verifying = True

  def extra_tokens(self, block: int) -> int:
    return block * (block - 1)

  def extra_predictions(self, block: int) -> int:
    return block - 1

  def extend(
    self, window: Batch, reach: Reach, base_B: jax.Array, block: int, noise_B: jax.Array
  ) -> tuple[Batch, Reach]:
    rows, width = window.ids.shape
    branch, index = jnp.divmod(jnp.arange(self.extra_tokens(block)), block - 1)
    ends = base_B[:, None] + branch[None]  # the last token that the branch takes for right
    positions = window.positions[:, :1] + ends + 1 + index[None]
    first = width + branch * (block - 1)
    noise = jnp.broadcast_to(noise_B[:, None], positions.shape)

    def both(own, added):
      return jnp.concatenate([own, added], axis=1)

    return Batch(
      ids=both(window.ids, noise),
      positions=both(window.positions, positions),
      is_noise=both(window.is_noise, jnp.ones(positions.shape, bool)),
    ), Reach(
      both(reach.upto, ends),
      jnp.concatenate([reach.first, first]),
      jnp.concatenate([reach.last, first + index]),
    )

  def predict(
    self,
    own: Predicted,
    verified_B: jax.Array,
    length_B: jax.Array,
    x_BTD: jax.Array,
    choose: Choose,
  ) -> Predicted:
    """The verified run with the token after it, then the branch's: [B, 2 N - 1]."""
    block = own.tokens.shape[1]
    width = x_BTD.shape[1] - self.extra_tokens(block)
    x_BND = slice_rows(x_BTD, width + verified_B * (block - 1), block - 1)
    ahead = choose(x_BND, length_B + verified_B + 1)
    index = jnp.arange(2 * block - 1)[None, :]
    in_branch = jnp.clip(index - verified_B[:, None] - 1, 0, block - 2)

    def join(own_BN, ahead_BN):
      run = jnp.take_along_axis(own_BN, jnp.minimum(index, block - 1), axis=1)
      after = jnp.take_along_axis(ahead_BN, in_branch, axis=1)
      return jnp.where(index <= verified_B[:, None], run, after)

    return jax.tree.map(join, own, ahead)

  def may_commit(self, sure: jax.Array, verified_B: jax.Array, block: int) -> jax.Array:
    """Predictions made after the verified run, up to where the branch ends."""
    offset = jnp.arange(sure.shape[1])[None, :] - verified_B[:, None]
    return (sure | (offset <= 0)) & (offset < block)
