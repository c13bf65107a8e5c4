"""What fits into a device's memory, and so how much a backward pass recomputes."""

import jax.numpy as jnp

from refine_jax.model import remat as remat_lib
from refine_jax.model.transformer import ModelConfig


def saved_bytes_per_token(
  config: ModelConfig, remat: str, itemsize: int, *, adapted: bool = False
) -> int:
  """An estimate of what all layers together keep of a token for the backward pass.

  Args:
    adapted: every projection has a low-rank change.
  """
  query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
  kept = config.width  # the residual stream between layers
  if remat != "full":
    kept += 2 * query + 2 * key
  if remat in ("save_attention_mlp", "none"):
    kept += 2 * config.feed_forward
  if remat == "none":
    # Norms' inputs in float32, rotations, the gated product: about as much again.
    more = 6 * config.width + 2 * query + 2 * key + 2 * config.feed_forward
    # With a change beside each product it is twice that, by XLA's analysis of Llama-3-8B's shape.
    kept += more * (1 + adapted)
  return kept * itemsize * config.layers


def kept_keys_values(config: ModelConfig, tokens: int, itemsize: int) -> int:
  """Bytes of the keys and values of all layers: what the clean stream hands to the drafts."""
  return tokens * 2 * config.kv_heads * config.head_dim * itemsize * config.layers


def choose_remat(
  wanted: str,
  config: ModelConfig,
  *,
  dtype: str,
  tokens: int,
  parameters: int,
  head_chunk: int,
  memory: int | None,
  moment_itemsize: int = 4,
  adapted: bool = False,
) -> str:
  """The policy that recomputes least among those that fit, or `wanted` where it names one.

  Args:
    tokens: in a micro-batch, on one device.
    parameters: on one device.
    memory: bytes of one device; None (a CPU): nothing is recomputed.
    adapted: parameters are those of an adapter.
  """
  if wanted != "auto":
    return remat_lib.resolve(wanted)
  if memory is None:
    return "none"
  itemsize = jnp.dtype(dtype).itemsize
  # Masters and moments, the sum of gradients, one round's gradients, the working copy.
  fixed = parameters * (4 + 4 + moment_itemsize + 4 + itemsize + itemsize)
  # A chunk's logits, those of the base next to them, and their gradient.
  fixed += head_chunk * config.vocab_size * (4 * (1 + adapted) + itemsize)
  room = 0.9 * memory - fixed
  for policy in remat_lib.POLICIES:
    # One layer's backward pass needs about as much as "none" keeps of it.
    saved, most = (
      tokens * saved_bytes_per_token(config, p, itemsize, adapted=adapted) for p in (policy, "none")
    )
    if saved + most / config.layers <= room:
      return policy
  return "full"
