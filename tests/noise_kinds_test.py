"""What every noise kind owes to the rounds, and the plan of the loss."""

import dataclasses

import jax
import numpy as np
import pytest
import train_fixtures as tiny

from refine_jax.config import NoiseConfig, ObjectiveConfig
from refine_jax.errors import UserError
from refine_jax.objective import noise, plan, rounds
from refine_jax.training.flops import train_flops_per_token

CONFIG = NoiseConfig(
  kind="uniform", block_size=5, offset_decay=0.9, noise_min=0.2, noise_max=0.8, token=-1
)
# No example holds it, and the predictions below are another.
NOISE, PREDICTED = 0, 36


# Each kind, and the one whose shape also depends on how many blocks a row gets.
CASES = [*((name, 0) for name in noise.KINDS), ("block", 7)]


def kind_of(name, **changes):
  return noise.from_config(dataclasses.replace(CONFIG, kind=name, **changes))


@pytest.mark.parametrize(("name", "anchors"), CASES)
def test_a_rounds_input_marks_its_noise_tokens_and_no_other(name, anchors):
  kind = kind_of(name, anchors=anchors)
  clean, noised = kind.corrupt(jax.random.key(0), tiny.packed_batch(), NOISE)
  later = np.full(noised.ids.shape, PREDICTED, np.int32)
  for shown in (
    rounds.first_round(clean, noised),
    rounds.next_round(clean, later, noised),
  ):
    used = np.asarray(clean.segment_ids) > 0
    np.testing.assert_array_equal(shown.is_noise, (np.asarray(shown.ids) == NOISE) & used)
  assert noised.is_noise.any()


@pytest.mark.parametrize(("name", "anchors"), CASES)
def test_a_kind_makes_the_columns_that_it_says_and_trains_on_responses_alone(name, anchors):
  kind, batch = kind_of(name, anchors=anchors), tiny.packed_batch()
  clean, noised = kind.corrupt(jax.random.key(0), batch, NOISE)
  shape = (len(batch.ids), kind.columns(batch.ids.shape[1]))
  assert {x.shape for x in noised} == {shape} == {clean.ids.shape}
  inside = clean.block_starts is not None or clean.block_columns is not None
  assert inside == kind.clean_text_inside
  for flags in (noised.trained, noised.refined, noised.clean, noised.is_noise):
    assert not np.any(np.asarray(flags) & ~np.asarray(clean.response_mask))
  assert noised.clean.sum() == batch.response_mask.sum()
  buckets = np.asarray(kind.bucket(noised))
  assert 0 <= buckets.min() <= buckets.max() < noise.NOISE_BUCKETS
  assert len(kind.buckets()) in (0, noise.NOISE_BUCKETS)


def test_a_kind_refuses_values_that_make_no_sense_for_it():
  for name, changes, message in (
    ("blocks", {}, "one of uniform, block"),
    ("uniform", {"noise_min": 0.9}, "noise_min=0.9 and noise_max=0.8"),
    ("block", {"block_size": 1}, "block_size is 1"),
    ("block", {"offset_decay": 0.0}, "offset_decay is 0.0"),
  ):
    with pytest.raises(UserError, match=message):
      kind_of(name, **changes)


def test_a_kind_describes_itself_and_tells_the_sampler_its_block():
  values = dataclasses.asdict(CONFIG)
  assert "replaced by EOS" in noise.describe(values, "EOS")
  assert "uniformly from [0.2, 0.8]." in noise.describe(values, "EOS")
  text = noise.describe(values | {"kind": "block"}, "EOS")
  assert "blocks of 5 tokens" in text and "the 4 drafts of each block are EOS" in text
  assert "counts 0.9 times as much" in text
  # A run from before there were kinds, and one from after this version.
  assert "[0.1, 0.9]" in noise.describe({"noise_min": 0.1, "noise_max": 0.9}, "EOS")
  assert noise.describe({"kind": "new"}, "EOS") == "Noise of kind 'new', with EOS."
  assert kind_of("uniform").refinement(7) == {"noise_token": 7, "block_size": None}
  assert kind_of("block").refinement(7) == {"noise_token": 7, "block_size": 5}


def terms(name, clean_weight, loss_weights=(1.0, 0.5)):
  objective = ObjectiveConfig(
    num_iterations=len(loss_weights), loss_weights=loss_weights, clean_weight=clean_weight
  )
  return plan.plan(objective, dataclasses.replace(CONFIG, kind=name))


def test_the_plan_names_each_term_and_says_which_cost_a_pass():
  assert terms("uniform", 0.0) == (("s0", 1.0, True), ("s1", 0.5, True))
  assert terms("uniform", 0.3)[0] == ("clean", 0.3, True)
  assert terms("block", 0.3)[0] == ("clean", 0.3, False)
  assert [plan.passes(terms(*x)) for x in (("uniform", 0.3), ("block", 0.3))] == [3, 2]


def test_flops_grow_with_the_passes_of_the_plan():
  one = train_flops_per_token(tiny.tiny_config(), 10.0, 1)
  passes = plan.passes(terms("uniform", 0.3))
  assert train_flops_per_token(tiny.tiny_config(), 10.0, passes) == 3 * one
