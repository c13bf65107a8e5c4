"""Blocks next to the clean text, against each block after a copy of its own prefix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_model
import train_fixtures as tiny

from refine_jax.attention import packed, ranged
from refine_jax.config import NoiseConfig
from refine_jax.objective import noise

NOISE = NoiseConfig(
  kind="block",
  block_size=5,
  offset_decay=1.0,
  noise_min=0.2,
  noise_max=0.8,
  token=tiny.NOISE_TOKEN,
)
DRAFTS = NOISE.block_size - 1


def add_noise(batch, key=0, config=NOISE):
  made = noise.add_noise(jax.random.key(key), batch, config, tiny.NOISE_TOKEN)
  return jax.tree.map(np.asarray, made)


def blocks_of(doubled):
  """For each block of the copy: its row, the columns of its prefix, and its own."""
  if doubled.block_columns is not None:
    return anchored_blocks(doubled)
  length = doubled.block_starts.shape[1]
  starts, positions = doubled.block_starts, doubled.positions[:, length:]
  response, examples = doubled.response_mask[:, :length], doubled.example_ids[:, :length]
  result = []
  for example in sorted(set(examples[response].tolist())):
    row = int(np.nonzero((examples == example).any(axis=1))[0][0])
    mine = examples[row] == example
    for start in sorted(set(starts[row][mine & response[row]].tolist())):
      prefix = np.nonzero(mine & (positions[row] < start))[0]
      block = np.nonzero(mine & response[row] & (starts[row] == start))[0]
      result.append((row, prefix, length + block))
  return result


def anchored_blocks(batch):
  """The same of blocks after each row; the last column of a whole one is there to be predicted."""
  rows, count, size = batch.block_columns.shape
  length, result = batch.ids.shape[1] - count * size, []
  for row, index in np.ndindex(rows, count):
    columns = batch.block_columns[row, index]
    block = length + index * size + np.arange(size)
    block = block[batch.response_mask[row, block]]
    if len(block):
      mine = batch.example_ids[row, :length] == batch.example_ids[row, block[0]]
      prefix = np.nonzero(mine & (np.arange(length) < columns[0]))[0]
      result.append((row, prefix, block))
  return result


def test_blocks_tile_each_response_from_a_random_phase_on():
  batch = tiny.packed_batch(60, per_row=4, length=80)
  doubled, noised = add_noise(batch)
  length = batch.ids.shape[1]
  covered, firsts = np.zeros((len(batch.ids), length), int), []
  for row, prefix, block in blocks_of(doubled):
    columns = block - length
    assert (np.diff(columns) == 1).all() and columns[0] == prefix[-1] + 1
    covered[row, columns] += 1
    if not batch.response_mask[row, columns[0] - 1]:
      firsts.append(len(columns))  # the first of its response
    elif columns[-1] + 1 < length and batch.response_mask[row, columns[-1] + 1]:
      assert len(columns) == DRAFTS
  np.testing.assert_array_equal(covered, batch.response_mask)
  assert set(firsts) == {1, 2, 3, 4}
  clean, copy = np.split(noised.ids, 2, axis=1)
  np.testing.assert_array_equal(clean, batch.ids)
  want = np.where(batch.response_mask, tiny.NOISE_TOKEN, batch.ids)
  np.testing.assert_array_equal(copy, want)


def test_what_further_rounds_see():
  doubled, noised = add_noise(tiny.packed_batch(60, per_row=4, length=80))
  kept = []
  for row, _, block in blocks_of(doubled):
    refined, later = noised.refined[row, block], noised.later[row, block]
    assert not refined[0] and later[0] == doubled.ids[row, block[0]]  # committed
    count = refined.sum()
    assert refined[1 : 1 + count].all()  # one run of predictions, then noise
    assert (later[1 + count :] == tiny.NOISE_TOKEN).all()
    if len(block) == DRAFTS:
      kept.append(count)
  assert set(kept) == set(range(DRAFTS))
  # The clean half stays as it is.
  clean = np.split(noised.later, 2, axis=1)[0]
  np.testing.assert_array_equal(clean, np.split(doubled.ids, 2, axis=1)[0])
  assert not np.split(noised.refined, 2, axis=1)[0].any()


def test_blocks_are_drawn_anew_with_the_key_and_not_with_the_packing():
  packed, rows = (add_noise(b) for b in (tiny.packed_batch(), tiny.unpacked_batch()))
  other = add_noise(tiny.packed_batch(), key=1)[0]
  for example in range(12):
    where, there = (b[0].example_ids == example for b in (packed, rows))
    for name in ("ids", "later", "refined", "weights"):
      got, want = (getattr(b[1], name) for b in (packed, rows))
      np.testing.assert_array_equal(got[where], want[there])
  assert (other.block_starts != packed[0].block_starts).any()


def test_later_drafts_count_less():
  doubled, noised = add_noise(
    tiny.packed_batch(), config=dataclasses.replace(NOISE, offset_decay=0.5)
  )
  for row, _, block in blocks_of(doubled):
    np.testing.assert_allclose(noised.weights[row, block], 0.5 ** np.arange(len(block)))


def clean_length(batch):
  if batch.block_columns is None:
    return batch.block_starts.shape[1]
  return batch.ids.shape[1] - batch.block_columns[0].size


def torch_oracle(params, config, doubled, noised, loss_weights, clean_weight):
  """Losses and gradient with a row for each block: its prefix, and the block after it."""
  leaves = torch_model.leaves(params)
  anchored = doubled.block_columns is not None
  length = clean_length(doubled)
  half = doubled._replace(block_starts=None, block_columns=None).map(lambda x: x[:, :length])
  blocks = blocks_of(doubled)
  width = max(len(prefix) + len(block) for _, prefix, block in blocks)
  segments = np.zeros((len(blocks), width), int)
  rows = np.zeros((len(blocks), width), int)
  for i, (row, prefix, block) in enumerate(blocks):
    segments[i, : len(prefix) + len(block)] = 1
    rows[i, : len(prefix)] = doubled.ids[row, prefix]
  current, losses = noised.ids.copy(), []

  for _ in loss_weights:
    for i, (row, prefix, block) in enumerate(blocks):
      rows[i, len(prefix) : len(prefix) + len(block)] = current[row, block]
    positions = np.tile(np.arange(width), (len(blocks), 1))
    logits = torch_model.forward(leaves, config, rows, segments, positions)
    log_probs, total, count = torch.log_softmax(logits, -1), 0.0, 0.0
    current = noised.later.copy()
    for i, (row, prefix, block) in enumerate(blocks):
      for j, column in enumerate(block):
        at = len(prefix) + j
        after = column + 1
        same = after < doubled.ids.shape[1] and (
          doubled.example_ids[row, after] == doubled.example_ids[row, column]
        )
        if anchored:
          same = j + 1 < len(block)
        if same:
          weight = noised.weights[row, column]
          total = total - weight * log_probs[i, at, doubled.ids[row, after]]
          count += weight
          if noised.refined[row, after]:
            current[row, after] = logits[i, at].argmax()
    losses.append(total / count)

  logits = torch_model.forward(leaves, config, half.ids, half.segment_ids, half.positions)
  where, columns = np.nonzero(half.response_mask)
  clean = -torch.log_softmax(logits, -1)[where, columns - 1, half.ids[where, columns]].mean()
  if clean_weight:
    losses, loss_weights = [clean, *losses], (clean_weight, *loss_weights)
  sum(w * loss for w, loss in zip(loss_weights, losses, strict=True)).backward()
  return [x.item() for x in losses], jax.tree.map(
    lambda x: np.zeros(x.shape) if x.grad is None else x.grad.numpy(), leaves
  )


@pytest.mark.parametrize(
  "rounds,clean_weight,decay,anchors",
  [(1, 0.0, 1.0, 0), (2, 0.5, 0.8, 0), (3, 1.0, 1.0, 0), (1, 1.0, 0.8, 5), (2, 0.5, 1.0, 30)],
)
def test_losses_and_gradients_equal_those_of_each_block_alone(rounds, clean_weight, decay, anchors):
  config = tiny.tiny_config()
  forward, params = tiny.forward(config), tiny.params_with_biases(config)
  noise_config = dataclasses.replace(NOISE, offset_decay=decay, anchors=anchors)
  doubled, noised = add_noise(tiny.packed_batch(), config=noise_config)
  weights = (1.0, 0.5, 0.25)[:rounds]
  arguments = (doubled, noised, weights, clean_weight)
  gradients, sums = tiny.gradients_of_rounds(forward, params, *arguments)
  torch_model.assert_equal(gradients, sums, *torch_oracle(params, config, *arguments))


def test_anchors_start_blocks_anywhere_in_the_responses():
  config = dataclasses.replace(NOISE, anchors=5)
  batch, starts = tiny.packed_batch(60, per_row=4, length=80), set()
  length = batch.ids.shape[1]
  for key in range(3):
    widened, noised = add_noise(batch, key, config)
    blocks = blocks_of(widened)
    assert len(blocks) <= 5 * len(batch.ids)
    for row, prefix, block in blocks:
      assert batch.response_mask[row, prefix[-1] + 1]
      columns = prefix[-1] + 1 + np.arange(len(block))
      np.testing.assert_array_equal(widened.ids[row, block], batch.ids[row, columns])
      np.testing.assert_array_equal(widened.positions[row, block], batch.positions[row, columns])
      assert (noised.ids[row, block] == tiny.NOISE_TOKEN).all() and len(block) > 1
      starts.add((row, int(columns[0])))
    np.testing.assert_array_equal(noised.ids[:, :length], batch.ids)
  assert len(starts) > 1.5 * len(blocks)  # drawn anew


@pytest.mark.parametrize("anchors", [0, 6])
@pytest.mark.parametrize("window", [None, 6])
def test_the_mask_is_that_of_the_clean_text_and_of_the_own_block(window, anchors):
  """Which keys a query reads, by the gradient."""
  config = dataclasses.replace(NOISE, anchors=anchors)
  doubled, _ = add_noise(tiny.packed_batch(6, per_row=3, length=40), config=config)
  total = doubled.ids.shape[1]
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (2, total, 2, 4)) for key in keys)
  beside = ranged.beside if anchors else packed.beside
  attend = beside(jax.tree.map(jnp.asarray, doubled))(window)
  reads = np.abs(jax.jacobian(lambda v: attend(q, k, v, None)[0].sum((2, 3)))(v)).sum((4, 5)) > 0
  want = np.zeros((2, total, total), bool)
  for row, prefix, block in blocks_of(doubled):
    for j, column in enumerate(block):
      seen = [*prefix, *block[: j + 1]]
      at = {c: p for c, p in enumerate(doubled.positions[row])}
      want[row, column, [c for c in seen if window is None or at[column] - at[c] < window]] = True
  used = want.any(-1)
  assert used.sum() == doubled.response_mask[:, clean_length(doubled) :].sum()
  for row in range(2):
    np.testing.assert_array_equal(reads[row, :, row][used[row]], want[row][used[row]])
    assert not reads[row, :, 1 - row].any()
