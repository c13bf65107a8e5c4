"""Predictors of block decoding, against a loop over examples in numpy."""

import types

import jax
import numpy as np
import train_fixtures as tiny

from refine_jax.objective import block_metrics, noise

BLOCK, PASSES, EOS = 4, 3, 1


def predict(shown):
  """A "model" whose next token is a fixed function of this one and its place in the row."""
  ids = shown.ids
  return types.SimpleNamespace(predictions=(ids * 3 + np.arange(ids.shape[1])[None]) % 7)


def batch_of(packed):
  """Ids that `predict` gets right where the text before is clean, but for every fifth place."""
  batch = tiny.packed_batch(40, per_row=4, length=80) if packed else tiny.unpacked_batch(40)
  ids = np.array(batch.ids)
  for row in range(len(ids)):
    for i in range(1, ids.shape[1]):
      same = batch.segment_ids[row, i] == batch.segment_ids[row, i - 1]
      if same and batch.response_mask[row, i]:
        ids[row, i] = (ids[row, i - 1] * 3 + i - 1) % 7 if i % 5 else 6
  return batch._replace(ids=ids)


def oracle(batch, noised):
  sums = {
    "right": np.zeros((PASSES, BLOCK)),
    "ended": np.zeros((PASSES, BLOCK)),
    "run": np.zeros(PASSES),
    "fixed": np.zeros(PASSES),
    "count": np.zeros(BLOCK),
    "blocks": 0.0,
  }
  for example in sorted(set(batch.example_ids.ravel().tolist()) - {-1}):
    row = int(np.nonzero((batch.example_ids == example).any(axis=1))[0][0])
    places = np.nonzero((batch.example_ids[row] == example) & noised.trained[row])[0]
    sums["blocks"] += 1
    sums["count"][: len(places)] += 1
    ids = np.array(noised.ids[row])
    for p in range(PASSES):
      predictions = np.asarray(predict(batch._replace(ids=ids[None])).predictions[0])
      new = predictions[places - 1]
      right = new == batch.ids[row, places]
      sums["right"][p, : len(places)] += right
      sums["ended"][p, : len(places)] += ~right & (new == EOS)
      sums["run"][p] += np.cumprod(right).sum()
      sums["fixed"][p] += (new == ids[places]).all()
      ids = np.array(batch.ids[row])
      ids[places] = new
  return sums


def test_sums_equal_a_loop_over_examples():
  for packed in (True, False):
    batch = batch_of(packed)
    noised = noise.block_noise(jax.random.key(5), batch, BLOCK, tiny.NOISE_TOKEN)
    noised = jax.tree.map(np.asarray, noised)
    got = block_metrics.block_sums(predict, batch, noised, block_size=BLOCK, passes=PASSES, eos=EOS)
    want = oracle(batch, noised)
    assert want["run"][-1] > want["run"][0] and want["ended"].any() and want["fixed"][-1] > 0
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_names_and_shares():
  sums = {
    "blocks": np.float32(4),
    "count": np.array([4, 2.0]),
    "run": np.array([2.0, 6.0]),
    "fixed": np.array([0.0, 3.0]),
    "right": np.array([[4, 0], [4, 1.0]]),
    "ended": np.array([[0, 1.0], [0, 0]]),
  }
  named = block_metrics.named(sums)
  assert named["block/run_s1"] == 1.5 and named["block/fixed_s1"] == 0.75
  assert named["block/accuracy_s0/offset_0"] == 1.0
  assert named["block/accuracy_s1/offset_1"] == 0.5
  assert named["block/wrong_eos_s0/offset_1"] == 0.5 and "block/fixed_s0" not in named
