"""Rows that are done change nothing, and no row depends on its company."""

import dataclasses

import jax
import numpy as np
import pytest
import sampler_fixtures
from hf_fixtures import tiny_hf_model

import refine_jax
from refine_jax.decoding import programs, sampler
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import requests
from refine_jax.decoding.settings import Settings

# Every mode and every draft once, and a sample.
OPTIONS = (
  {"mode": "exact", "draft": "tail"},
  {"mode": "exact", "draft": "ngram", "temperature": 1.0},
  {"mode": "threshold", "draft": "noise", "tau": 0.2},
  {"mode": "fixed", "refine_iter": 3},
)
EOS = sampler_fixtures.EOS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory, _ = tiny_hf_model("qwen3", tmp_path_factory.mktemp("rows"), num_hidden_layers=2)
  return refine_jax.load(directory)


def state_after(model, options, passes):
  """The state of four rows after some passes, as numpy, and the settings."""
  static = {name: options[name] for name in ("mode", "draft") if name in options}
  settings = Settings(block=5, **({"draft": "noise"} | static))
  prompts = sampler_fixtures.unequal_prompts(4, model.config.vocab_size)
  arguments = (model.decoding_params(1), model.config, settings, prompts)
  row = {"size": 64, "new": 24, "noise": EOS, "eos": [EOS]}
  state = as_numpy(sampler_fixtures.entered(*arguments, **row, **options))
  for _ in range(passes):
    state = one_pass(model, settings, state)
  return state, settings


def one_pass(model, settings, state):
  run = programs.jitted(sampler.traced_pass, model.config, settings, None)
  return as_numpy(run(model.decoding_params(1), state, np.zeros(len(state.done), bool))[0])


def as_numpy(state):
  return jax.tree.map(np.array, state)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_done_rows_change_nothing(model, options):
  state, settings = state_after(model, options, passes=2)
  assert not state.done.any()
  over = np.array([False, True, False, True])
  live = one_pass(model, settings, as_numpy(state))
  half = one_pass(model, settings, as_numpy(state._replace(done=over)))
  for name in ("tokens", "length", "cached", "limit", "turn", "passes"):
    before, after, alone = (getattr(s, name) for s in (state, half, live))
    np.testing.assert_array_equal(after[over], before[over], err_msg=name)
    np.testing.assert_array_equal(after[~over], alone[~over], err_msg=name)
  assert half.done[over].all()
  committed = (live.length - state.length)[~over]
  gained = half.accepted - state.accepted
  assert not gained[over].any()
  np.testing.assert_array_equal(gained[~over], committed[:, None] > np.arange(5))
  for before, after in zip(state.caches, half.caches, strict=True):
    for one, other in zip(before, after, strict=True):
      for row in np.flatnonzero(over):
        filled = state.cached[row]
        np.testing.assert_allclose(other[row, :, :filled], one[row, :, :filled], atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_rows_tokens_passes_and_counts_are_its_own(model, options):
  """Long and short rows together against the same rows alone."""
  prompts = sampler_fixtures.unequal_prompts(5, model.config.vocab_size, seed=3)
  budget = {"block_size": 4, "max_new_tokens": 14, "eos_token_id": EOS} | options
  together = refine_jax.generate(model, prompts, **budget)
  assert len(set(together.passes)) > 1
  np.testing.assert_allclose(
    np.array(together.accepted) * sum(together.passes),
    np.sum(
      [
        np.arange(4) < seen.committed
        for row in refine_jax.generate(model, prompts, trace=True, **budget).trace.rows
        for seen in row
      ],
      axis=0,
    ),
  )
  if "temperature" not in options:  # a sample depends on the row's place too
    for row, prompt in enumerate(prompts):
      alone = refine_jax.generate(model, [prompt], **budget)
      assert alone.tokens == [together.tokens[row]]
      assert alone.passes == [together.passes[row]]


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_programs_for_greedy_rows_and_for_samples_do_what_the_one_for_any_does(model, options):
  """As GPUs have them; greedy rows are right in the second too."""
  state, settings = state_after(model, options, passes=1)
  want = one_pass(model, settings, state)
  for kind in ("sampled",) if "temperature" in options else ("greedy", "sampled"):
    got = one_pass(model, dataclasses.replace(settings, sampling=kind), state)
    for name in ("tokens", "length", "cached", "drafted"):
      np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


def test_more_passes_than_needed_are_not_run(model):
  state, settings = state_after(model, OPTIONS[0], passes=0)
  decode = programs.jitted(sampler.decode, model.config, settings, None)

  def run(state, passes=1000, least=1):
    none = np.zeros(len(state.done), bool)
    after, report = decode(model.decoding_params(1), state, none, np.int32(passes), np.int32(least))
    np.testing.assert_array_equal(report, [after.length, after.passes, after.done])
    return as_numpy(after)

  ended = run(as_numpy(state))
  assert ended.done.all() and ended.passes.max() <= 24
  again = run(as_numpy(ended))
  for one, other in zip(ended[:-1], again[:-1], strict=True):
    jax.tree.map(np.testing.assert_array_equal, one, other)
  # It stops as soon as fewer rows than asked for are on their way.
  one_less = run(as_numpy(state), least=4)
  assert one_less.done.any() and not one_less.done.all()
  assert one_less.passes.max() == np.min(ended.passes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_that_enter_and_leave_change_no_answer(model, options):
  """Few slots, prompts of many pieces, any order: tokens, passes and samples are the same."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(3, 61, n).tolist() for n in (3, 210, 7, 129, 1, 128, 40, 200, 12)]
  budget = {"block_size": 4, "eos_token_id": EOS, "noise_token": EOS} | options
  want = [
    refine_jax.generate(model, [prompt], first_row=row, max_new_tokens=5 + 3 * row, **budget)
    for row, prompt in enumerate(prompts)
  ]
  engine = Engine(model, 3, options=Options(**budget))
  order = rng.permutation(len(prompts)).tolist()
  found = {}
  for row in order:
    each = Options(max_new_tokens=5 + 3 * row, **budget)
    (request,) = requests(model, [prompts[row]], each, rows=[row])
    found[request] = row
    engine.submit(request)
  answers = {}
  while engine.busy:
    answers |= {found[answer.request]: answer for answer in engine.step(2)}
  for row, alone in enumerate(want):
    assert answers[row].tokens == alone.tokens[0]
    assert [answers[row].passes] == alone.passes
    assert answers[row].text is None or answers[row].text == alone.texts[0]


def test_rows_of_one_batch_may_differ_in_every_value(model):
  """Greedy next to samples, each with its own stop ids, noise and threshold: as each is alone."""
  prompts = sampler_fixtures.unequal_prompts(5, model.config.vocab_size, seed=2)
  values = [
    {},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 2.0, "top_k": 3, "eos_token_id": [4, 5]},
    {"tau": 0.05, "noise_token": 7},
    {"temperature": 1.0, "top_p": 0.5, "tau": 0.5, "max_new_tokens": 3},
  ]
  engine, alone, found = None, [], {}
  for row, (prompt, value) in enumerate(zip(prompts, values, strict=True)):
    options = {"mode": "threshold", "block_size": 4, "max_new_tokens": 12, "tau": 0.2} | value
    alone.append(refine_jax.generate(model, [prompt], first_row=row, **options))
    engine = engine or Engine(model, 8, options=Options(**options))
    (request,) = requests(model, [prompt], Options(**options), rows=[row])
    found[request] = row
    engine.submit(request)
  answers = {}
  while engine.busy:
    answers |= {found[answer.request]: answer.tokens for answer in engine.step()}
  assert [answers[row] for row in range(5)] == [one.tokens[0] for one in alone]
  assert engine.costs.programs <= 3
