"""Drafts "ngram": as the text went on where it said the same before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

import jax
import jax.numpy as jnp

from refine_jax.attention.cached import slice_rows, write_rows
from refine_jax.decoding.drafts.tail import TailDrafts


class NgramDrafts(TailDrafts):
  """Continues the last earlier occurrence of a row's last two tokens; without one, the tail."""

  def fill(
    self, tokens: jax.Array, drafted_B: jax.Array, length_B: jax.Array, block: int
  ) -> tuple[jax.Array, jax.Array]:
    index = jnp.arange(tokens.shape[1] - 1)[None, :]
    last = slice_rows(tokens, jnp.maximum(length_B - 2, 0), 2)
    same = (tokens[:, :-1] == last[:, :1]) & (tokens[:, 1:] == last[:, 1:])
    start_B = jnp.max(jnp.where(same & (index < length_B[:, None] - 2), index, -1), axis=1)
    # Read one by one, because a short period runs into its own continuation.
    period = length_B - 2 - start_B
    offsets = jnp.arange(block)[None, :] % jnp.maximum(period, 1)[:, None]
    continued = jnp.take_along_axis(tokens, jnp.maximum(start_B, 0)[:, None] + 2 + offsets, axis=1)
    found = start_B >= 0
    drafted_B = jnp.where(found, jnp.maximum(drafted_B, length_B + block), drafted_B)
    return jnp.where(found[:, None], write_rows(tokens, continued, length_B), tokens), drafted_B
