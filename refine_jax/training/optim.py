"""AdamW with warm-up and cosine, as an optax chain whose learning rate is applied by the step."""

import jax
import jax.numpy as jnp
import optax

from refine_jax.config import OptimConfig


def schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
  """Linear from 0 over warmup_ratio of the steps, then half a cosine to 0.

  Step 0 already learns: the warm-up's first value is lr / warm-up steps.
  """
  warmup = warmup_steps(config, total_steps)
  decay = optax.cosine_decay_schedule(config.lr, max(total_steps - warmup, 1))

  def rate(step):
    rising = config.lr * (step + 1) / max(warmup, 1)
    return jnp.where(step < warmup, rising, decay(step - warmup))

  return rate


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
  return int(total_steps * config.warmup_ratio)


def decays(params: dict) -> dict:
  """Weight decay's mask: kernels, embedding and head, but no norm scale and no bias."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in ("scale", "bias"), params
  )


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Clipping, Adam's direction and decoupled weight decay (arXiv:1711.05101), no learning rate.

  The step multiplies by the learning rate itself, so that it follows the step's number and
  nothing else.
  """
  parts = []
  if config.clip_norm is not None:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  beta1, beta2 = config.betas
  parts.append(optax.scale_by_adam(beta1, beta2, config.eps, mu_dtype=config.moment_dtype))
  if config.weight_decay > 0:
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
  return optax.chain(*parts)
