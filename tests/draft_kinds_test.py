"""What every draft kind owes to the sampler, whichever it is."""

import functools

import jax
import numpy as np
import pytest
import sampler_fixtures

from refine_jax.decoding import drafts, sampler, settings
from refine_jax.decoding import state as state_lib
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
  static = {name: options.pop(name) for name in ("mode", "draft") if name in options}
  bound = settings.Settings(block=BLOCK, **static)
  # They repeat, for n-grams.
  prompts = [[i % 3 + 10 * row + 2 for i in range(length)] for row, length in enumerate((5, 3))]
  enter = compiled(functools.partial(state_lib.enter, config=model.config, settings=bound))
  arguments = (model.decoding_params(1), model.config, bound, prompts)
  rows = {"size": 64, "new": 20, "noise": NOISE, "eos": [39], "enter": enter}
  state, batch = sampler_fixtures.entered(*arguments, **rows, **options)
  seen = [batch]
  one_pass = compiled(functools.partial(sampler.one_pass, config=model.config, settings=bound))
  for _ in range(count):
    (state, _), batch = one_pass(model.decoding_params(1), state)
    seen.append(batch)
  return seen, bound


# Whose later passes hold noise tokens too; a kind that writes all drafts itself has none.
WITH_NOISE = ("tail", "noise", "ngram", "branches", "budget", "cycle")
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
