"""From logits to tokens: greedy, or a sample of what temperature, top-k and top-p leave."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax import target
from refine_jax.batch import Batch

if TYPE_CHECKING:
  from refine_jax.decoding.state import Choices

# In the place of a token where the model says nothing: a logit is NaN, or the best is infinite.
NOT_FINITE = -1


def choose(
  logits: jax.Array,
  positions_BN: jax.Array,
  choices: "Choices",
  rows: str = "any",
  *,
  both: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """A token for each place, and its probability.

  What no row asks for is not computed: Gumbel noise, and the order of the logits.

  Args:
    logits: float32 [B, N, V].
    positions_BN: int32, where in the row each token would stand.
    choices: of the rows: seed, inverse_temperature, top_k, top_p.
    rows: Settings.sampling.
    both: whether the probability is read; what computes it alone is removed by XLA where it is not.

  Returns:
    int32 [B, N], NOT_FINITE where there is none; and float32 [B, N]: the probability in the
    distribution that was chosen from.
  """
  samples = choices.inverse_temperature > 0
  greedy = _greedy_in_one if both and target.platform() == "gpu" else _greedy

  def either(logits):
    token, probability = greedy(logits)
    sampled, sampled_probability = _sample(logits, positions_BN, choices)
    here = samples[:, None]
    return (
      jnp.where(here, sampled, token),
      jnp.where(here, sampled_probability, probability),
    )

  if rows == "any":
    return jax.lax.cond(jnp.any(samples), either, greedy, logits)
  return greedy(logits) if rows == "greedy" else either(logits)


def _greedy(logits):
  # The first NaN where there is one.
  chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logit = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
  probability = jnp.exp(logit - jax.nn.logsumexp(logits, axis=-1))
  return jnp.where(jnp.isfinite(logit), chosen, NOT_FINITE), probability


def _greedy_in_one(logits):
  """What `_greedy` gives, in one kernel that reads the logits once; on a CPU it would take longer.

  With many rows the logits are what a pass reads most of, after the caches.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)

  def joined(one, other):
    (best, total, place), (best_2, total_2, place_2) = one, other
    less = jnp.exp(-jnp.abs(best - best_2))  # one of the sums is relative to the smaller best
    ahead = (best > best_2) | ((best == best_2) & (place < place_2))
    total = jnp.where(ahead, total + total_2 * less, total * less + total_2)
    # Of NaN the maximum is NaN.
    return jnp.maximum(best, best_2), total, jnp.where(ahead, place, place_2)

  least = jnp.finfo(logits.dtype).min
  best, total, place = jax.lax.reduce(
    (logits, jnp.ones_like(logits), index),
    (np.array(least, logits.dtype), np.zeros((), logits.dtype), np.int32(0)),
    joined,
    (logits.ndim - 1,),
  )
  said = jnp.isfinite(best) & (best > least)
  return jnp.where(said, place, NOT_FINITE), 1 / total


def _sample(logits, positions_BN, choices):
  best = jnp.max(logits, axis=-1, keepdims=True)
  # The best at 0, so that no temperature makes them infinite.
  logits = (logits - best) * choices.inverse_temperature[:, None, None]
  filters = jnp.any((choices.top_k > 0) | (choices.top_p < 1))
  logits = jax.lax.cond(filters, lambda x: _filter(x, choices), lambda x: x, logits)

  def gumbel(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.gumbel(key, logits.shape[-1:])

  noise = jax.vmap(jax.vmap(gumbel, in_axes=(None, 0)))(choices.seed, positions_BN)
  chosen = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
  logit = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
  probability = jnp.exp(logit - jax.nn.logsumexp(logits, axis=-1))
  return jnp.where(jnp.isfinite(best[..., 0]), chosen, NOT_FINITE), probability


def _filter(logits, choices):
  """Top-k, then top-p (Holtzman et al. 2020, arXiv:1904.09751): the rest becomes -inf."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  last = jnp.clip(choices.top_k - 1, 0, logits.shape[-1] - 1)
  index = jnp.broadcast_to(last[:, None, None], (*logits.shape[:-1], 1))
  kth = jnp.take_along_axis(ordered, index, axis=-1)
  least = jnp.where((choices.top_k > 0)[:, None, None], kth, -jnp.inf)
  ordered = jnp.where(ordered < least, -jnp.inf, ordered)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = jnp.where(before < choices.top_p[:, None, None], ordered, jnp.inf)
  nucleus = jnp.min(kept, axis=-1, keepdims=True)
  # Of all of them rounding would leave out the last.
  nucleus = jnp.where((choices.top_p < 1)[:, None, None], nucleus, -jnp.inf)
  return jnp.where(logits < jnp.maximum(least, nucleus), -jnp.inf, logits)


def with_random_noise(window: Batch, vocab_size: int) -> Batch:
  """The window with noise tokens of any id, each a function of its position alone."""
  key = jax.random.key(0)

  def draw(position):
    return jax.random.randint(jax.random.fold_in(key, position), (), 0, vocab_size)

  drawn = jax.vmap(jax.vmap(draw))(window.positions)
  return window._replace(ids=jnp.where(window.is_noise, drawn, window.ids))
