"""Where block decoding and autoregressive decoding part, and by how much."""

import json
import sys

import numpy as np
import pytest
import sampler_fixtures

import refine_jax
from refine_jax.decoding import generation
from scripts import sample

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return sampler_fixtures.text_model_directory(tmp_path_factory.mktemp("text"), "qwen2")


@pytest.fixture(scope="module")
def model(directory):
  return refine_jax.load(directory)


def test_exact_answers_are_equal_in_float32(model):
  out = refine_jax.compare_with_ar(model, PROMPTS, block_size=5, max_new_tokens=12, strict=True)
  assert out.equal and len(out.rows) == 3
  assert out.answers.tokens == out.ar.tokens
  assert out.ar.tokens_per_pass == 1
  assert str(out).splitlines()[2] == "answer 3: equal to ar"


def test_prompts_are_read_once(model):
  out = refine_jax.compare_with_ar(model, iter(PROMPTS), block_size=5, max_new_tokens=4)
  assert out.answers.prompts == out.ar.prompts == PROMPTS


def first_differences(out):
  """Written otherwise than in the library, on padded arrays."""
  width = max(map(len, out.answers.tokens + out.ar.tokens)) + 1
  pad = lambda rows: np.array([r + [-1] * (width - len(r)) for r in rows])  # noqa: E731
  different = pad(out.answers.tokens) != pad(out.ar.tokens)
  return [int(d.argmax()) if d.any() else None for d in different]


def test_differences_are_placed_and_measured(model):
  """A mode that commits unverified tokens parts from ar somewhere."""
  options = {"mode": "threshold", "tau": 0.0, "block_size": 6, "max_new_tokens": 10}
  out = refine_jax.compare_with_ar(model, PROMPTS, trace=True, **options)
  assert not out.equal and out.answers.trace is not None
  assert [row.offset for row in out.rows] == first_differences(out)
  for prompt, row, ours, theirs in zip(
    PROMPTS, out.rows, out.answers.tokens, out.ar.tokens, strict=True
  ):
    if row.offset is not None:
      logits = np.asarray(model(np.array([prompt + theirs[: row.offset]])))[0, -1]
      second, best = np.sort(logits)[-2:]
      np.testing.assert_allclose(row.margin, best - second, rtol=1e-3, atol=1e-4)
      assert row.ar_token == logits.argmax() == theirs[row.offset]
      assert row.token == ours[row.offset]


def test_strict_comparison_says_where(model):
  options = {"mode": "threshold", "tau": 0.0, "block_size": 6, "max_new_tokens": 10}
  with pytest.raises(refine_jax.UserError, match=r"Answer 1 differs from ar at token \d+, .*apart"):
    refine_jax.compare_with_ar(model, PROMPTS[:1], strict=True, **options)


def test_an_answer_that_ends_early_differs_where_it_ends(model, monkeypatch):
  whole = generation.generate(model, [[5]], max_new_tokens=4, mode="ar")

  def generate(model, prompts, mode="exact", **options):
    out = generation.generate(model, prompts, mode=mode, **options)
    return out if mode == "ar" else out.__class__(**(vars(out) | {"tokens": [out.tokens[0][:2]]}))

  monkeypatch.setattr("refine_jax.decoding.comparison.generate", generate)
  (row,) = refine_jax.compare_with_ar(model, [[5]], max_new_tokens=4).rows
  assert (row.offset, row.token, row.ar_token) == (2, None, whole.tokens[0][2])
  assert row.margin > 0


def test_bfloat16_answers_are_compared_too(directory):
  model = refine_jax.load(directory, dtype="bfloat16")
  out = refine_jax.compare_with_ar(model, PROMPTS, block_size=8, max_new_tokens=12)
  assert [row.offset for row in out.rows] == first_differences(out)
  assert all(row.margin is None or 0 <= row.margin < 0.2 for row in out.rows)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"stream": True}])
def test_what_cannot_be_compared_is_refused(model, options):
  with pytest.raises(refine_jax.UserError, match=next(iter(options))):
    refine_jax.compare_with_ar(model, PROMPTS, **options)


def script(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
  with pytest.raises(SystemExit) as status:
    sample.main()
  return status.value.code, capsys.readouterr()


def test_the_script_checks(directory, model, monkeypatch, capsys):
  common = (f"--model={directory}", "--max_new_tokens=6", "--check", "--prompt=what is two")
  code, (printed, notes) = script(monkeypatch, capsys, *common)
  notes = sampler_fixtures.without_progress(notes)
  assert not code and notes.startswith("answer 1: equal to ar\n[") and printed.endswith("\n---\n")
  code, (printed, _) = script(
    monkeypatch, capsys, *common, "--jsonl", "--mode=threshold", "--tau=0"
  )
  answer = json.loads(printed)
  want = refine_jax.compare_with_ar(
    model, ["what is two"], mode="threshold", tau=0.0, max_new_tokens=6
  ).rows[0]
  assert want.offset is not None
  assert (answer["differs_from_ar_at"], answer["margin"]) == (want.offset, want.margin)
  code, (_, errors) = script(monkeypatch, capsys, f"--model={directory}", "--chat", "--check")
  errors = sampler_fixtures.without_progress(errors)
  assert code == 1 and errors.startswith("error: --check")


def test_a_mode_that_verifies_nothing_is_not_told_to_use_float32(model):
  options = {"mode": "fixed", "block_size": 6, "refine_iter": 1, "max_new_tokens": 12}
  with pytest.raises(
    refine_jax.UserError, match="mode='fixed' commits what nothing has verified"
  ) as error:
    refine_jax.compare_with_ar(model, PROMPTS, strict=True, **options)
  assert "float32" not in str(error.value)
