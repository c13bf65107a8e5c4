"""Rows that are done change nothing, and no row depends on its company."""

import numpy as np
import pytest
import sampler_fixtures
from hf_fixtures import tiny_hf_model

import refine_jax
from refine_jax.decoding import sampler
from refine_jax.decoding import settings as sampler_settings

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
  settings = sampler_settings.Settings(
    block=5, noise_token=EOS, eos_ids=(EOS,), **({"draft": "noise"} | options)
  )
  rows, width, size = 4, 16, 64
  prompts = np.zeros((rows, width), np.int32)
  lengths = np.zeros(rows, np.int32)
  for row, prompt in enumerate(sampler_fixtures.unequal_prompts(rows, model.config.vocab_size)):
    prompts[row, : len(prompt)], lengths[row] = prompt, len(prompt)
  prefill = sampler.prefill_program(model.config)
  tokens, caches = prefill(
    model.decoding_params,
    prompts,
    lengths,
    np.int32(EOS),
    size=size,
    ahead=settings.drafts_of_prompt,
  )
  state = sampler.begin(
    tokens,
    caches,
    lengths,
    lengths + 24,
    np.zeros(rows, bool),
    np.arange(rows, dtype=np.uint32),
    settings,
  )
  for _ in range(passes):
    state = one_pass(model, settings, state)
  return state, settings


def one_pass(model, settings, state):
  run = sampler.programs(model.config, settings)[1]
  return as_numpy(run(model.decoding_params, state)[0])


def as_numpy(state):
  caches = [(np.array(k), np.array(v)) for k, v in state.caches]
  return sampler.State(*(x if x is state.caches else np.array(x) for x in state))._replace(
    caches=caches
  )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_done_rows_change_nothing(model, options):
  state, settings = state_after(model, options, passes=2)
  assert not state.done.any()
  over = np.array([False, True, False, True])
  live = one_pass(model, settings, as_numpy(state))
  half = one_pass(model, settings, as_numpy(state._replace(done=over)))
  for name in ("tokens", "length", "cached", "limit", "turn", "passes", "seeds"):
    before, after, alone = (getattr(s, name) for s in (state, half, live))
    np.testing.assert_array_equal(after[over], before[over], err_msg=name)
    np.testing.assert_array_equal(after[~over], alone[~over], err_msg=name)
  assert half.done[over].all()
  committed = (live.length - state.length)[~over]
  gained = half.accepted - state.accepted
  np.testing.assert_array_equal(gained, [(committed > place).sum() for place in range(5)])
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


def test_more_passes_than_needed_are_not_run(model):
  state, settings = state_after(model, OPTIONS[0], passes=0)
  decode = sampler.programs(model.config, settings)[0]
  ended = as_numpy(decode(model.decoding_params, state, np.int32(1000)))
  assert ended.done.all() and ended.passes.max() <= 24
  again = as_numpy(decode(model.decoding_params, as_numpy(ended), np.int32(1000)))
  for one, other in zip(ended[:-2], again[:-2], strict=True):
    np.testing.assert_array_equal(one, other)
