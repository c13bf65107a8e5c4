"""What every draft kind owes to the sampler, whichever it is."""

import functools

import jax
import numpy as np
import pytest
import sampler_fixtures

from refine_jax.decoding import drafts, sampler, settings
from refine_jax.model import transformer

# The model never predicts it, and no prompt holds it.
NOISE = 0
ROWS, BLOCK = 2, 4


def passes(monkeypatch, count, **options):
  """The batch that each pass gives to the model, and the settings; the prompt's pass first."""
  model = sampler_fixtures.copier_model()
  given, run = [], transformer.hidden_states

  def spy(params, config, batch, *args, **more):
    given.append(batch)
    return run(params, config, batch, *args, **more)

  def compiled(function):  # what it gives, and the batch of its pass
    return jax.jit(lambda *args: (function(*args), given.pop()))

  monkeypatch.setattr(transformer, "hidden_states", spy)
  bound = settings.Settings(block=BLOCK, noise_token=NOISE, eos_ids=(39,), **options)
  lengths = np.array([5, 3], np.int32)
  prompts = np.full((ROWS, 8), 1, np.int32)
  for row, length in enumerate(lengths):
    prompts[row, :length] = np.arange(length) % 3 + 10 * row + 2  # repeats, for n-grams
  more = {"config": model.config, "size": 64, "ahead": bound.drafts_of_prompt}
  prefill = compiled(functools.partial(sampler.prefill, **more))
  (tokens, caches), batch = prefill(model.decoding_params, prompts, lengths, NOISE)
  done, seeds = np.zeros(ROWS, bool), np.zeros(ROWS, np.uint32)
  state = sampler.begin(tokens, caches, lengths, lengths + 20, done, seeds, bound)
  seen = [batch]
  one_pass = compiled(functools.partial(sampler.one_pass, config=model.config, settings=bound))
  for _ in range(count):
    (state, _), batch = one_pass(model.decoding_params, state)
    seen.append(batch)
  return seen, bound


# Whose later passes hold noise tokens too; a kind that writes all drafts itself has none.
WITH_NOISE = ("tail", "noise", "ngram", "branches")
CASES = [(kind, "exact") for kind in drafts.KINDS] + [("tail", "threshold"), ("tail", "fixed")]


@pytest.mark.parametrize("kind, mode", CASES)
def test_a_pass_marks_its_noise_tokens_and_is_as_wide_as_its_kind_says(monkeypatch, kind, mode):
  seen, bound = passes(monkeypatch, 3, draft=kind, mode=mode, tau=0.5)
  for batch in seen:
    np.testing.assert_array_equal(batch.is_noise, batch.ids == NOISE)
  one = drafts.KINDS[kind]
  width = bound.window + one.extra_tokens(BLOCK)
  assert {batch.ids.shape for batch in seen[1:]} == {(ROWS, width)}
  assert bound.width == BLOCK + one.extra_predictions(BLOCK)
  later = any(np.asarray(batch.is_noise).any() for batch in seen[1:])
  assert later == (kind in WITH_NOISE)
