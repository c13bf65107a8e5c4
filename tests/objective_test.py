"""Noise, shift, rounds and their gradients against oracles in numpy and torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_model
import train_fixtures as tiny

from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig
from refine_jax.model.head import cross_entropy
from refine_jax.objective import noise as noise_lib
from refine_jax.objective import plan as plan_lib
from refine_jax.objective import rounds as objective

NOISE = NoiseConfig(
  kind="uniform",
  block_size=4,
  offset_decay=1.0,
  noise_min=0.2,
  noise_max=0.8,
  token=tiny.NOISE_TOKEN,
)


def add_noise(batch, key=0, config=NOISE):
  return noise_lib.add_noise(jax.random.key(key), batch, config, tiny.NOISE_TOKEN)[1]


def noise(batch, key=0, config=NOISE):
  noised = add_noise(batch, key, config)
  return noised.ids, noised.rates


def test_the_prompt_and_the_padding_are_never_noised():
  batch = tiny.packed_batch(60, per_row=4, length=80)
  noised, _ = noise(batch, config=dataclasses.replace(NOISE, noise_min=1.0, noise_max=1.0))
  response = batch.response_mask
  np.testing.assert_array_equal(noised[~response], batch.ids[~response])
  assert (np.asarray(noised)[response] == tiny.NOISE_TOKEN).all()


def test_a_rate_of_zero_changes_nothing():
  batch = tiny.packed_batch()
  noised, rates = noise(batch, config=dataclasses.replace(NOISE, noise_min=0.0, noise_max=0.0))
  np.testing.assert_array_equal(noised, batch.ids)
  assert (np.asarray(rates) == 0).all()


def test_an_examples_noise_does_not_depend_on_what_it_is_packed_with():
  packed, rows = tiny.packed_batch(), tiny.unpacked_batch()
  got, _ = noise(packed)
  want, _ = noise(rows)
  for example in range(12):
    where, there = packed.example_ids == example, rows.example_ids == example
    np.testing.assert_array_equal(got[where], want[there])


def test_noise_changes_with_the_key_and_with_nothing_else():
  batch = tiny.packed_batch()
  first, again, other = noise(batch)[0], noise(batch)[0], noise(batch, key=1)[0]
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_rates_are_uniform_between_their_bounds_and_the_share_noised_follows_them():
  length, count = 200, 400
  batch = Batch(
    ids=np.full((count, length), 5, np.int32),
    segment_ids=np.ones((count, length), np.int32),
    positions=np.tile(np.arange(length, dtype=np.int32), (count, 1)),
    response_mask=np.ones((count, length), bool),
    example_ids=np.repeat(np.arange(count, dtype=np.int32)[:, None], length, axis=1),
  )
  noised, rates = (np.asarray(x) for x in noise(batch))
  assert (rates == rates[:, :1]).all()
  rates = np.sort(rates[:, 0])
  uniform = 0.2 + 0.6 * (np.arange(count) + 0.5) / count
  # Kolmogorov-Smirnov: 1.63 / sqrt(n) is passed once in a hundred keys; this key is fixed.
  assert np.abs(rates - uniform).max() < 0.6 * 1.63 / np.sqrt(count)
  share = (noised == tiny.NOISE_TOKEN).mean(axis=1)
  spread = np.sqrt(0.25 / length)
  assert np.abs(np.sort(share) - rates).mean() < 2 * spread


def test_targets_are_the_next_token_of_the_same_example():
  batch = tiny.packed_batch()
  targets, scored = objective.next_token_targets(batch)
  ids, segments, mask = batch.ids, batch.segment_ids, batch.response_mask
  rows, length = ids.shape
  for b in range(rows):
    for i in range(length):
      same = i + 1 < length and segments[b, i] == segments[b, i + 1]
      assert scored[b, i] == (same and mask[b, i + 1])
      if scored[b, i]:
        assert targets[b, i] == ids[b, i + 1]
  assert scored.sum() == mask.sum()  # every response token has someone to predict it


def torch_oracle(params, config, batch, noised, loss_weights, clean_weight=0.0):
  """Losses of all passes and the gradient of their weighted sum, with dense logits, in torch."""
  leaves = torch_model.leaves(params)
  ids, losses = np.asarray(batch.ids), []

  def one_pass(current, mask):
    logits = torch_model.forward(leaves, config, current, batch.segment_ids, batch.positions)
    log_probs = torch.log_softmax(logits, -1)
    rows, columns = np.nonzero(mask)  # the tokens scored, each predicted by the one before
    losses.append(-log_probs[rows, columns - 1, ids[rows, columns]].mean())
    current = ids.copy()
    current[rows, columns] = logits.argmax(-1).numpy()[rows, columns - 1]
    return current

  if clean_weight:
    one_pass(ids, batch.response_mask)
  current = np.asarray(noised.ids)
  for _ in loss_weights:
    current = one_pass(current, np.asarray(noised.trained))
  weights = (clean_weight, *loss_weights) if clean_weight else loss_weights
  total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
  total.backward()
  return [loss.item() for loss in losses], jax.tree.map(lambda x: x.grad.numpy(), leaves)


@pytest.mark.parametrize(
  "rounds,tied,clean_weight",
  [(1, True, 0.0), (1, False, 0.0), (2, True, 0.0), (2, False, 0.5), (3, False, 0.0)],
)
def test_losses_and_gradients_of_all_rounds_equal_those_of_torch(rounds, tied, clean_weight):
  config = tiny.tiny_config(tied_head=tied)
  forward = tiny.forward(config)
  params, batch = tiny.params_with_biases(config), tiny.packed_batch()
  weights = (1.0, 0.5, 0.25)[:rounds]
  noised = add_noise(batch)
  arguments = (batch, noised, weights, clean_weight)
  gradients, sums = tiny.gradients_of_rounds(forward, params, *arguments)
  torch_model.assert_equal(gradients, sums, *torch_oracle(params, config, *arguments))


def test_a_round_of_weight_zero_still_makes_the_next_ones_input():
  batch, forward, params = tiny.packed_batch(), tiny.forward(), tiny.tiny_params()
  stacked = jax.tree.map(lambda x: x[None], (batch, add_noise(batch)))

  def sums(weights):
    plan = plan_lib.of_weights(weights)
    by_name = objective.refinement_gradients(forward.loss, params, *stacked, plan)[1]
    return [by_name[term.name]["loss"] for term in plan]

  np.testing.assert_array_equal(sums((0.0, 1.0)), sums((1.0, 1.0)))


def test_no_gradient_passes_through_the_greedy_decode():
  """With the weight on round 1 alone, round 0's logits must not matter beyond their argmax."""
  batch = tiny.unpacked_batch(4)
  noised = add_noise(batch)
  vocabulary = 37

  def round_one(table):
    # A "model" whose first round reads `table` and whose second does not.
    predictions = jnp.argmax(table, axis=-1)
    ids = objective.next_round_ids(batch, predictions, noised)
    return jnp.sum(jax.nn.one_hot(ids, vocabulary) * table)

  table = jax.random.normal(jax.random.key(0), (*batch.ids.shape, vocabulary))
  gradient = jax.grad(round_one)(table)
  ids = objective.next_round_ids(batch, jnp.argmax(table, -1), noised)
  # Only the direct path: the one-hot of the ids, as if they were constants.
  np.testing.assert_array_equal(gradient, jax.nn.one_hot(ids, vocabulary))


def test_corrupted_and_clean_tokens_are_counted_apart():
  batch = tiny.packed_batch()
  noised, _ = noise(batch)
  targets, scored = objective.next_token_targets(batch)
  x = jax.random.normal(jax.random.key(0), (*targets.shape, 8))
  head = jax.random.normal(jax.random.key(1), (37, 8))
  _, output = cross_entropy(x, head, targets, scored.astype(jnp.float32))
  weights = scored.astype(jnp.float32)
  sums = jax.tree.map(np.sum, objective.round_sums(batch, noised, targets, weights, output))
  changed = np.asarray(noised) != batch.ids
  assert sums["corrupted"] == changed.sum()
  assert sums["clean"] == (batch.response_mask & ~changed).sum()
  right = np.asarray(output.predictions == targets) & np.asarray(scored)
  assert sums["corrupted_right"] + sums["clean_right"] == right.sum()


def test_a_round_feeds_predictions_into_the_response_only():
  batch = tiny.packed_batch()
  predictions = np.full(batch.ids.shape, 36, np.int32)
  ids = np.asarray(objective.next_round_ids(batch, predictions, add_noise(batch)))
  assert (ids[batch.response_mask] == 36).all()
  np.testing.assert_array_equal(ids[~batch.response_mask], batch.ids[~batch.response_mask])


def test_offsets_count_from_the_first_response_token():
  batch = tiny.packed_batch()
  offsets, lengths = noise_lib.response_offsets(batch), noise_lib.response_lengths(batch)
  for example in range(12):
    where = batch.example_ids == example
    response = batch.response_mask[where]
    want = np.arange(len(response)) - np.argmax(response)
    np.testing.assert_array_equal(np.asarray(offsets)[where], want)
    assert (np.asarray(lengths)[where] == response.sum()).all()
