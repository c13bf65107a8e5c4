"""From logits to tokens: greedy, or a sample of what temperature, top-k and top-p leave."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from refine_jax.batch import Batch
from refine_jax.decoding.compile_cache import bucket
from refine_jax.decoding.settings import Settings

if TYPE_CHECKING:
  from refine_jax.decoding.sampler import State

# In the place of a token where the model says nothing: a logit is NaN, or the best is infinite.
NOT_FINITE = -1


def choose(
  logits: jax.Array, positions_BN: jax.Array, state: "State", settings: Settings
) -> tuple[jax.Array, jax.Array]:
  """A token for each place, and its probability.

  Args:
    logits: float32 [B, N, V].
    positions_BN: int32, where in the row each token would stand.
    state: sampler.State: seeds, inverse_temperature, top_k, top_p.
    settings: Settings; whether it samples and filters, not the values.

  Returns:
    int32 [B, N], NOT_FINITE where there is none; and float32 [B, N]: the probability in the
    distribution that was chosen from.
  """
  if settings.temperature > 0:
    best = jnp.max(logits, axis=-1, keepdims=True)
    # The best at 0, so that no temperature makes them infinite.
    logits = (logits - best) * state.inverse_temperature[:, None, None]
    logits = _filter(logits, state, settings)

    def gumbel(seed, position):
      key = jax.random.fold_in(jax.random.key(seed), position)
      return jax.random.gumbel(key, logits.shape[-1:])

    noise = jax.vmap(jax.vmap(gumbel, in_axes=(None, 0)))(state.seeds, positions_BN)
    chosen = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    logit = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    finite = jnp.isfinite(best[..., 0])
  else:
    # The first NaN where there is one.
    chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logit = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    finite = jnp.isfinite(logit)
  probability = jnp.exp(logit - jax.nn.logsumexp(logits, axis=-1))
  return jnp.where(finite, chosen, NOT_FINITE), probability


def _filter(logits, state, settings):
  """Top-k, then top-p (Holtzman et al. 2020, arXiv:1904.09751): the rest becomes -inf."""
  if settings.top_k:
    most = jax.lax.top_k(logits, min(bucket(settings.top_k, 1), logits.shape[-1]))[0]
    last = jnp.clip(state.top_k - 1, 0, most.shape[-1] - 1)
    index = jnp.broadcast_to(last[:, None, None], (*most.shape[:-1], 1))
    kth = jnp.take_along_axis(most, index, axis=-1)
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if settings.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before < state.top_p[:, None, None], ordered, jnp.inf)
    logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
  return logits


def with_random_noise(window: Batch, vocab_size: int) -> Batch:
  """The window with noise tokens of any id, each a function of its position alone."""
  key = jax.random.key(0)

  def draw(position):
    return jax.random.randint(jax.random.fold_in(key, position), (), 0, vocab_size)

  drawn = jax.vmap(jax.vmap(draw))(window.positions)
  return window._replace(ids=jnp.where(window.is_noise, drawn, window.ids))
