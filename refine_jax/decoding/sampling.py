"""From logits to tokens: greedy, or a sample of what temperature, top-k and top-p leave."""

import jax
import jax.numpy as jnp


def choose(logits, positions_BN, seeds_B, settings):
  """A token for each place, and its probability.

  Args:
    logits: float32 [B, N, V].
    positions_BN: int32, where in the row each token would stand.
    seeds_B: uint32.
    settings: sampler_settings.Settings.

  Returns:
    int32 [B, N], and float32 [B, N]: the probability in the distribution that was chosen from.
  """
  if settings.temperature > 0:
    # The best at 0, so that no temperature makes them infinite.
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    logits = _filter(logits / settings.temperature, settings)

    def gumbel(seed, position):
      key = jax.random.fold_in(jax.random.key(seed), position)
      return jax.random.gumbel(key, logits.shape[-1:])

    noise = jax.vmap(jax.vmap(gumbel, in_axes=(None, 0)))(seeds_B, positions_BN)
    chosen = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
  else:
    chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logit = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
  return chosen, jnp.exp(logit - jax.nn.logsumexp(logits, axis=-1))


def _filter(logits, settings):
  """Top-k, then top-p (Holtzman et al. 2020, arXiv:1904.09751): the rest becomes -inf."""
  if settings.top_k:
    kth = jax.lax.top_k(logits, min(settings.top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if settings.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before < settings.top_p, ordered, jnp.inf)
    logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
  return logits
