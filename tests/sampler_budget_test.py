"""Drafts that share a budget out, pass by pass, against the model over whole sequences."""

import dataclasses

import numpy as np
import pytest
import sampler_fixtures
from hf_fixtures import tiny_hf_model
from sampler_branches_test import LONGEST, NEW, predictions

import refine_jax
from refine_jax.hf.calibration import Calibration, Curve
from refine_jax.hf.generation_config import Refinement

EOS, BLOCK = sampler_fixtures.EOS, 5
# Of a random model, whose probabilities are near 1 / 61: so its chances are about one half.
CURVE = Curve((0.7, 0.9, 1.0), (4.0, 3.5, 3.2), (0.7, 0.8, 0.6, 0.9))


@pytest.fixture(scope="module", params=[("qwen3", {}), ("mistral", {"sliding_window": 5})])
def model(request, tmp_path_factory):
  family, options = request.param
  place = tmp_path_factory.mktemp("budget")
  directory, _ = tiny_hf_model(family, place, num_hidden_layers=2, **options)
  loaded = refine_jax.load(directory)
  return dataclasses.replace(
    loaded, refinement=Refinement(EOS, BLOCK, calibration=Calibration(CURVE))
  )


def chances(probabilities):
  """What the curve makes of them, by numpy."""
  p = np.clip(np.float32(probabilities), np.float32(1e-5), np.float32(1 - 1e-5))
  places = [min(i, 2) for i in range(len(p))]
  temperature, shift = (
    np.float32([v[i] for i in places]) for v in (CURVE.temperature, CURVE.shift)
  )
  return 1 / (1 + np.exp(-((np.log(p) - np.log1p(-p)) / temperature + shift)))


def worth(count):
  return np.cumprod([CURVE.accepted[min(i, 3)] for i in range(count)], dtype=np.float64)


def shared_out(chance, worth, room):
  """(drafts, run lengths) by sorting (value, what): the rule of allocation.py in plain Python."""
  survives = np.concatenate([[1.0], np.cumprod(chance)])
  ends = survives * (1 - np.concatenate([chance, [0.0]]))
  runs = [(-e * w, j, i) for j, e in enumerate(ends) for i, w in enumerate(worth)]
  items = [(-s, -1, i) for i, s in enumerate(survives[1:])] + runs
  drafts = sum(run == -1 for _, run, _ in sorted(items)[:room])
  ends = [*ends[:drafts], survives[drafts]]
  runs = sorted((-e * w, j, i) for j, e in enumerate(ends) for i, w in enumerate(worth))
  taken = [j for _, j, _ in runs[: room - drafts]]
  return drafts, [taken.count(j) for j in range(drafts + 1)]


def passes(model, prompt, kind, tokens):
  """What each pass predicts and commits, and how many drafts it verifies."""
  text, block = list(prompt), BLOCK
  noise = [EOS] * (block - 1)
  drafts, sure = predictions(model, text + noise, len(text) - 1)
  drafts, sure = drafts[: block - 1], [1.0, *sure[1 : block - 1]]
  while True:
    if kind == "cycle":
      count = len(drafts)
      runs = [0] * count + [min(tokens - 1 - count, block - 1)]
    else:
      count, runs = shared_out(chances(sure), worth(block - 1), tokens - 1)
    own, _ = predictions(model, text + drafts[:count], len(text) - 1)
    right = [a == b for a, b in zip(own, drafts[:count], strict=False)] + [False]
    verified = right.index(False)
    run = runs[verified]
    branch, branch_sure = predictions(
      model, text + drafts[:verified] + noise[:run], len(text) + verified
    )
    predicted = own[: verified + 1] + branch
    room = len(prompt) + NEW - len(text)
    committed = min(verified + 1, room)
    ends = [i + 1 for i, token in enumerate(predicted[:committed]) if token == EOS]
    committed = min([committed, *ends])
    yield predicted[:room], committed, count
    if ends or committed == room:
      return
    text += predicted[:committed]
    drafts, sure = predicted[committed:], branch_sure


@pytest.mark.parametrize(
  "kind, tokens", [("budget", 6), ("budget", 13), ("budget", 40), ("cycle", 5), ("cycle", 8)]
)
def test_each_pass_verifies_and_drafts_what_is_worth_most(model, kind, tokens):
  prompts = sampler_fixtures.unequal_prompts(4, model.config.vocab_size, seed=tokens)
  out = refine_jax.generate(
    model,
    prompts,
    draft=kind,
    block_size=BLOCK,
    budget=tokens,
    max_new_tokens=NEW,
    eos_token_id=EOS,
    noise_token=EOS,
    trace=True,
  )
  counts, verified = set(), 0
  for row, prompt in zip(out.trace.rows, prompts, strict=True):
    want = list(passes(model, prompt, kind, tokens))
    got = [
      (one.tokens[: len(tokens)], one.committed)
      for one, (tokens, *_) in zip(row, want, strict=True)
    ]
    assert got == [(tokens, committed) for tokens, committed, _ in want]
    counts |= {count for *_, count in want}
    verified += sum(committed - 1 for _, committed, _ in want)
  # With room for all there is nothing to choose.
  assert verified > 0 and (len(counts) > 1) == (tokens < 24)
  assert max(map(len, prompts)) + NEW + BLOCK <= LONGEST
