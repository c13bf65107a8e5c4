"""Drafts in branches, pass by pass, against the model over whole sequences."""

import jax
import numpy as np
import pytest
import sampler_fixtures
from hf_fixtures import tiny_hf_model

import refine_jax

EOS = sampler_fixtures.EOS
NEW, LONGEST = 14, 40


@pytest.fixture(scope="module", params=[("qwen3", {}), ("mistral", {"sliding_window": 5})])
def model(request, tmp_path_factory):
  family, options = request.param
  place = tmp_path_factory.mktemp("branches")
  directory, _ = tiny_hf_model(family, place, num_hidden_layers=2, **options)
  return refine_jax.load(directory)


def predictions(model, ids, first):
  """The most likely token after each place from `first` on, and its probability."""
  padded = np.array([ids + [0] * (LONGEST - len(ids))])
  logits = np.asarray(model(padded))[0, first : len(ids)]
  return logits.argmax(-1).tolist(), np.asarray(jax.nn.softmax(logits)).max(-1).tolist()


def passes(model, prompt, block, tau):
  """What each pass predicts and commits, as long as its drafts are those of the pass before."""
  text, noise = list(prompt), [EOS] * (block - 1)
  drafts = predictions(model, text + noise, len(text) - 1)[0][: block - 1]
  while len(drafts) == block - 1:
    own, sure = predictions(model, text + drafts, len(text) - 1)
    right = [a == b for a, b in zip(own, drafts, strict=False)] + [False]
    verified = right.index(False)
    # Noise takes the place of the token after the verified run, and of those after it.
    branch, branch_sure = predictions(model, text + drafts[:verified] + noise, len(text) + verified)
    predicted = own[: verified + 1] + branch
    certain = [True] * (verified + 1) + [p >= tau for p in branch_sure] + [False]
    room = len(prompt) + NEW - len(text)
    count = min(certain.index(False), room)
    ends = [i + 1 for i, token in enumerate(predicted[:count]) if token == EOS]
    count = min([count, *ends])
    yield predicted[:room], count
    if ends or count == room:
      return
    text += predicted[:count]
    drafts = predicted[count:][: block - 1]


@pytest.mark.parametrize("tau", [None, 0.05, 0.2])
@pytest.mark.parametrize("block", [2, 3, 5])
def test_each_pass_continues_what_was_verified(model, block, tau):
  """tau=None: mode exact, whose drafts a wrong branch would not change the text of."""
  prompts = sampler_fixtures.unequal_prompts(4, model.config.vocab_size, seed=block)
  mode = {"mode": "exact"} if tau is None else {"mode": "threshold", "tau": tau}
  out = refine_jax.generate(
    model,
    prompts,
    draft="branches",
    block_size=block,
    max_new_tokens=NEW,
    eos_token_id=EOS,
    noise_token=EOS,
    trace=True,
    **mode,
  )
  compared = 0
  for row, prompt in zip(out.trace.rows, prompts, strict=True):
    want = list(passes(model, prompt, block, np.inf if tau is None else tau))
    seen = [(one.tokens, one.committed) for one in row[: len(want)]]
    got = [(tokens[: len(x)], count) for (tokens, count), (x, _) in zip(seen, want, strict=True)]
    assert got == want
    assert tau is not None or len(row) == len(want)
    compared += len(want)
  assert compared >= len(prompts)
