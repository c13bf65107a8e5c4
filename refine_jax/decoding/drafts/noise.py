"""Drafts "noise": a run of noise tokens in every pass, as at the start of a block in training."""

import jax
import jax.numpy as jnp

from refine_jax.decoding.drafts.tail import TailDrafts


class NoiseDrafts(TailDrafts):
  """Drops predictions that were not committed; the prompt's pass need make none."""

  def prompt_drafts(self, block: int) -> int:
    return 0

  def following(
    self,
    predicted: jax.Array,
    count_B: jax.Array,
    accepted_B: jax.Array,
    length_B: jax.Array,
    noise_B: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    committed = jnp.arange(predicted.shape[1])[None, :] < accepted_B[:, None]
    return jnp.where(committed, predicted, noise_B[:, None]), length_B + accepted_B
