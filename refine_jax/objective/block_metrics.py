"""What validation says about decoding in blocks, before anything is decoded.

One block of each example is put before the model as a sampler does: after the clean text stands a
run of noise tokens, and each pass after the first sees the last one's predictions. The reference
stands for what the model would write itself, so the numbers are lower bounds where it would say
the same in other words.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from refine_jax.batch import Batch
from refine_jax.objective import noise as noise_lib
from refine_jax.objective import rounds as objective
from refine_jax.objective.noise import Noised


def block_sums(
  predict: Callable, batch: Batch, noised: Noised, *, block_size: int, passes: int, eos: int
) -> dict:
  """Sums over the blocks of a batch [B, T].

  Args:
    predict: a round's Batch -> HeadOutput.
    noised: of noise.block_noise; its first pass sees noise.
    eos: the id that ends an answer.

  Returns:
    blocks: float32 scalar, how many there are.
    count: float32 [block_size], tokens at each offset; responses end within their last block.
    right: float32 [passes, block_size], those predicted right.
    ended: float32 [passes, block_size], those predicted as EOS and wrongly so.
    run: float32 [passes], right predictions before the first wrong one of each block: what one
      more pass would verify.
    fixed: float32 [passes], blocks that the pass gave back as it got them.
  """
  block = noised.trained
  offset = noise_lib.response_offsets(batch)
  first = block & ~_before(block, batch)
  start = _since(first, offset)
  by_offset = jax.nn.one_hot(offset - start, block_size) * block[..., None]

  def collect(ids, output):
    after = objective.next_round_ids(batch, output.predictions, noised)
    right = block & (after == batch.ids)
    ended = block & ~right & (after == eos)
    unbroken = block & (_count_since(first, block & ~right) == 0)
    unchanged = block & (_count_since(first, block & (after != ids)) == 0)
    last = block & ~_after(block, batch)
    return {
      "right": jnp.einsum("bt,btn->n", right.astype(jnp.float32), by_offset),
      "ended": jnp.einsum("bt,btn->n", ended.astype(jnp.float32), by_offset),
      "run": jnp.sum(unbroken, dtype=jnp.float32),
      "fixed": jnp.sum(unchanged & last, dtype=jnp.float32),
    }

  sums = objective.refine(predict, batch, noised, num_rounds=passes, collect=collect)
  return sums | {
    "count": jnp.sum(by_offset, axis=(0, 1)),
    "blocks": jnp.sum(first, dtype=jnp.float32),
  }


def named(sums: dict) -> dict:
  """block_sums -> shares: run_s0.., fixed_s1.., accuracy_s0/offset_0.., eos/offset_0.."""
  blocks = max(float(sums["blocks"]), 1.0)
  counts = [max(float(n), 1.0) for n in sums["count"]]
  result = {}
  for i, run in enumerate(sums["run"]):
    result[f"block/run_s{i}"] = float(run) / blocks
    if i:  # the first pass gets noise
      result[f"block/fixed_s{i}"] = float(sums["fixed"][i]) / blocks
    for j, count in enumerate(counts):
      result[f"block/accuracy_s{i}/offset_{j}"] = float(sums["right"][i, j]) / count
  for j, count in enumerate(counts):
    # The collapse: a run of EOS as noise makes the next EOS likely.
    result[f"block/wrong_eos_s0/offset_{j}"] = float(sums["ended"][0, j]) / count
  return result


def _before(flags_BT, batch):
  """Whether the token before, of the same example, has the flag."""
  shifted = jnp.pad(flags_BT[:, :-1], ((0, 0), (1, 0)))
  return shifted & (batch.positions > 0)


def _after(flags_BT, batch):
  """Whether the token after, of the same example, has the flag."""
  same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
  return jnp.pad(flags_BT[:, 1:] & same, ((0, 0), (0, 1)))


def _since(first_BT, values_BT):
  """The value at the last place with the flag, 0 before there is one."""
  place = jnp.where(first_BT, jnp.arange(first_BT.shape[1])[None], -1)
  place = jax.lax.cummax(place, axis=1)
  found = jnp.take_along_axis(values_BT, jnp.maximum(place, 0), axis=1)
  return jnp.where(place >= 0, found, 0)


def _count_since(first_BT, flags_BT):
  """How many flags there are from the last place with `first`, up to and with each place."""
  total = jnp.cumsum(flags_BT, axis=1)
  return total - _since(first_BT, total - flags_BT)
