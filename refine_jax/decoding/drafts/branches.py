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

from refine_jax.attention.cached import Reach
from refine_jax.batch import Batch
from refine_jax.decoding.drafts.kind import Choose, Layout, Predicted, Rows
from refine_jax.decoding.drafts.tail import TailDrafts


class BranchDrafts(TailDrafts):
  """Adds N branches of N - 1 noise tokens; predictions go on in the branch that came true."""

  needs_verifying = True

  def extra_tokens(self, block: int) -> int:
    return block * (block - 1)

  def extra_predictions(self, block: int) -> int:
    return block - 1

  def lay_out(self, window: Batch, reach: Reach, rows: Rows, block: int) -> Layout:
    batch, width = window.ids.shape
    branch, index = jnp.divmod(jnp.arange(self.extra_tokens(block)), block - 1)
    ends = rows.base[:, None] + branch[None]  # the last token that the branch takes for right
    positions = window.positions[:, :1] + ends + 1 + index[None]
    first = jnp.broadcast_to((width + branch * (block - 1))[None], positions.shape)
    lasts = first + index[None]
    noise = jnp.broadcast_to(rows.noise[:, None], positions.shape)

    def both(own, added):
      return jnp.concatenate([own, added], axis=1)

    starts = width + jnp.arange(block)[None, :] * (block - 1)
    return Layout(
      Batch(
        ids=both(window.ids, noise),
        positions=both(window.positions, positions),
        is_noise=both(window.is_noise, jnp.ones(positions.shape, bool)),
      ),
      Reach(both(reach.upto, ends), both(reach.first, first), both(reach.last, lasts)),
      jnp.full_like(rows.base, block - 1),
      jnp.broadcast_to(starts, (batch, block)),
      jnp.full((batch, block), block - 1),
    )

  def predict(
    self, own: Predicted, verified_B: jax.Array, layout: Layout, choose: Choose
  ) -> tuple[Predicted, jax.Array]:
    predicted, _ = self.join(own, verified_B, layout, choose)
    return predicted, jnp.full_like(verified_B, predicted.tokens.shape[1])

  def join(
    self, own: Predicted, verified_B: jax.Array, layout: Layout, choose: Choose
  ) -> tuple[Predicted, jax.Array]:
    """The verified run with the token after it, then its run of noise; and how many these are."""
    assert layout.first is not None and layout.count is not None
    block = own.tokens.shape[1]
    after = verified_B[:, None]
    first = jnp.take_along_axis(layout.first, after, axis=1)
    # Past its end a short run gives what another says, which does not count.
    last = layout.batch.ids.shape[1] - 1
    ahead = choose(jnp.minimum(first + jnp.arange(block - 1)[None, :], last))
    index = jnp.arange(2 * block - 1)[None, :]
    in_branch = jnp.clip(index - after - 1, 0, block - 2)

    def both(own_BN, ahead_BN):
      run = jnp.take_along_axis(own_BN, jnp.minimum(index, block - 1), axis=1)
      return jnp.where(index <= after, run, jnp.take_along_axis(ahead_BN, in_branch, axis=1))

    count = jnp.take_along_axis(layout.count, after, axis=1)[:, 0]
    return jax.tree.map(both, own, ahead), verified_B + 1 + count

  def may_commit(self, sure: jax.Array, verified_B: jax.Array, block: int) -> jax.Array:
    """Predictions made after the verified run, up to where the branch ends."""
    offset = jnp.arange(sure.shape[1])[None, :] - verified_B[:, None]
    return (sure | (offset <= 0)) & (offset < block)
