"""Scorers, intervals and the accounting of an evaluation."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from refine_jax.decoding import generation
from refine_jax.errors import UserError
from refine_jax.evaluation import evaluate, report, scoring

CONFIGS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py"))


def test_exact_reads_what_follows_the_last_mark():
  row = {"answer": "12"}
  assert scoring.exact("3*4\nAnswer: 12", row)
  assert scoring.exact(" 12 ", row)
  assert not scoring.exact("Answer: 12\nAnswer: 13", row)
  assert not scoring.exact("Answer: 121", row)


def test_numeric_compares_values():
  row = {"answer": "1200"}
  assert scoring.numeric("so it is 1,200.0", row)
  assert not scoring.numeric("no idea", row)
  assert not scoring.numeric("1200 or 7", row)


def test_reasoning_gym_gives_no_credit_for_parts():
  pytest.importorskip("reasoning_gym")
  row = {"task": "spell_backward", "prompt": "?", "answer": "cba", "meta": '{"word": "abc"}'}
  assert scoring.reasoning_gym("Letters: a b c\nAnswer: cba", row)
  assert not scoring.reasoning_gym("Answer: cbaa", row)
  assert not scoring.reasoning_gym("cba", row)


def test_math_verify_reads_expressions():
  row = {"answer": "\\frac{1}{2}"}
  assert scoring.math_verify("So it is \\boxed{0.5}", row)
  assert scoring.math_verify("Answer: $\\frac{2}{4}$", row)
  assert not scoring.math_verify("Answer: $\\frac{2}{3}$", row)
  assert not scoring.math_verify("no idea", row)
  assert scoring.math_verify("it is 1200", {"answer": "1200"})


def test_scorers_are_chosen_by_columns_and_say_what_they_lack():
  assert scoring.choose("auto", {"answer": 1}) is scoring.exact
  full = {"answer": 1, "task": 1, "meta": 1, "prompt": 1}
  assert scoring.choose("auto", full) is scoring.reasoning_gym
  with pytest.raises(UserError, match="answer"):
    scoring.choose("numeric", {"prompt": 1})
  with pytest.raises(UserError, match="exact, numeric"):
    scoring.choose("best", full)


def test_wilson_solves_its_equation():
  """The bounds p are where |share - p| = z sqrt(p (1 - p) / n)."""
  for successes, count in ((0, 10), (3, 10), (10, 10), (293, 500)):
    for bound in report.wilson(successes, count):
      distance = abs(successes / count - bound)
      assert math.isclose(
        distance, 1.96 * math.sqrt(max(bound * (1 - bound), 0) / count), abs_tol=1e-9
      )


@pytest.mark.parametrize(
  "text, want",
  [
    ("ar", {"mode": "ar"}),
    ("fixed:3", {"mode": "fixed", "refine_iter": 3}),
    ("threshold:0.5", {"mode": "threshold", "tau": 0.5}),
    ("exact:ngram", {"mode": "exact", "draft": "ngram"}),
    ("threshold:0.5:branches", {"mode": "threshold", "tau": 0.5, "draft": "branches"}),
    ("threshold:branches", {"mode": "threshold", "tau": 0.9, "draft": "branches"}),
  ],
)
def test_modes_are_read(text, want):
  assert evaluate.parse_mode(text) == want


@pytest.mark.parametrize("text", ["fast", "fixed:two", "exact:none", "exact:tail:2"])
def test_unknown_modes_are_refused(text):
  with pytest.raises(UserError, match="--modes"):
    evaluate.parse_mode(text)


@pytest.mark.parametrize(
  "option, message",
  [
    ("--block_sizes=8,x", "--block_sizes='8,x' must be numbers"),
    ("--data=gone.parquet", "No file matches 'gone.parquet'; correct --data."),
  ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, option, message):
  command = ["evaluate", "--model=nowhere", "--data=gone.parquet", option]
  monkeypatch.setattr(sys, "argv", command)
  with pytest.raises(SystemExit) as ended:
    evaluate.main()
  assert ended.value.code == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "recipes"])
def test_every_config_takes_every_recipe(name):
  module = importlib.import_module(f"configs.{name}")
  kinds = {recipe: module.get_config(recipe).noise.kind for recipe in ("document", "blocks")}
  assert kinds == {"document": "uniform", "blocks": "block"}
  assert module.get_config("ar_sft").noise.noise_max == 0
  assert module.get_config() == module.get_config("document")


def test_tokens_a_pass_count_rows_that_stopped(monkeypatch, tmp_path):
  """Three problems in batches of two: the filled-up row of the last batch counts nowhere."""
  answers = {"a": ("1", True, 8, 2), "b": ("x", False, 100, 10), "c": ("3", True, 4, 4)}

  def generate(model, prompts, **options):
    texts, stopped, tokens, passes = zip(*(answers[p] for p in prompts), strict=True)
    return SimpleNamespace(
      texts=texts,
      stopped=stopped,
      tokens=[[0] * n for n in tokens],
      passes=passes,
      prefill_seconds=1.0,
      decode_seconds=2.0,
    )

  monkeypatch.setattr(generation, "generate", generate)
  rows = [
    {"prompt": p, "answer": a, "task": t}
    for p, a, t in (("a", "1", "x"), ("b", "2", "x"), ("c", "3", "y"))
  ]
  numbers, outcomes = evaluate.evaluate(None, rows, scoring.exact, batch_size=2)
  assert numbers["tokens_per_pass"] == 12 / 6 and numbers["not_stopped"] == 1
  assert numbers["solved"] == 2 / 3 and numbers["by_task"] == {"x": 0.5, "y": 1.0}
  assert numbers["seconds_per_problem"] == 2.0 and numbers["tokens"] == 112
  report.write_answers(tmp_path, "exact-8", outcomes)
  lines = (tmp_path / "answers-exact-8.jsonl").read_text().splitlines()
  assert [json.loads(line)["solved"] for line in lines] == [True, False, True]
  results = [numbers | {"mode": "exact", "block_size": 8}]
  assert report.plot(results, tmp_path / "accuracy.png")
  assert (tmp_path / "accuracy.png").stat().st_size > 5000
