"""Scorers, intervals and the accounting of an evaluation."""

import datetime
import decimal
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import fuzz, taken_or_refused, values
from hypothesis import strategies as st

from refine_jax.decoding import generation
from refine_jax.errors import UserError
from refine_jax.evaluation import evaluate, plot, reading, report, scoring

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
  for lack in ({"meta": "{"}, {"meta": None}, {"task": "no_such_task"}):
    with pytest.raises(scoring.Unscorable):  # whatever the model says
      scoring.reasoning_gym("cba", row | lack)


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
    ("exact:budget:16", {"mode": "exact", "draft": "budget", "budget": 16}),
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


@pytest.mark.parametrize(
  "option, message",
  [
    ("--modes=ar,ar", "has ar with blocks of 1 twice"),
    ("--block_sizes=0", "block_size=0 cannot be"),
    ("--modes=fixed:branches", "needs a mode that verifies"),
    ("--limit=-1", "--limit='-1' must be a whole number of at least 0"),
    ("--batch_size=0", "--batch_size='0' must be a whole number of at least 1"),
    ("--batch_size=many", "--batch_size='many' must be"),
    ("--scorer=best", "--scorer=best is not known"),
    ("--prompt_key=question", "has no column 'question'; it has prompt, answer"),
    ("--output={used}", "exists and is not empty"),
    ("--data={text}", "cannot be read as parquet"),
    ("--data={data},{other}", "other.parquet (--data) has no column 'answer'"),
  ],
)
def test_options_are_checked_before_the_model_is_loaded(
  monkeypatch, capsys, tmp_path, option, message
):
  monkeypatch.setattr(evaluate.loading, "load", lambda *_, **__: pytest.fail("loaded"))
  places = {name: tmp_path / f"{name}.parquet" for name in ("data", "other", "text")}
  write(places["data"], prompt=["a"], answer=["b"])
  write(places["other"], prompt=["a"], solution=["b"])
  places["text"].write_text("prompt,answer")
  option = option.format(used=tmp_path, **places)
  data = f"--data={places['data']}"
  monkeypatch.setattr(sys, "argv", ["evaluate", "--model=x", data, "--output=never", option])
  with pytest.raises(SystemExit) as ended:
    evaluate.main()
  errors = capsys.readouterr().err
  assert ended.value.code == 1 and errors.startswith("error: ") and errors.count("\n") == 1
  assert message in errors


def write(path, **columns):
  pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_rows_are_read_from_parquet_and_json_lines_and_have_places(tmp_path):
  write(tmp_path / "a.parquet", prompt=["a", "b"], answer=[1, None], other=[0, 0])
  (tmp_path / "b.jsonl").write_text('{"prompt": "c", "answer": 2}\nno json\n{"prompt": "d"}\n')
  files = f"{tmp_path / 'a.parquet'},{tmp_path / 'b.jsonl'}"
  got = reading.read(files, 0, "--data", ("prompt", "answer"))
  assert [row["prompt"] for row in got.rows] == ["a", "b", "c", b"", "d"]
  assert [row["answer"] for row in got.rows] == [1, None, 2, b"", None]
  assert got.places[3] == f"{tmp_path / 'b.jsonl'}, row 1 (from 0)"
  assert got.columns == {"prompt", "answer"}
  assert len(reading.read(files, 3, "--data").rows) == 3
  with pytest.raises(UserError, match="-1 rows of --data"):
    reading.read(files, -1, "--data")


def test_any_value_of_a_table_is_written_as_json():
  day = datetime.date(2024, 1, 15)
  values = {
    "decimal": decimal.Decimal("1.50"),
    "date": day,
    "bytes": b"caf\xc3\xa9 \xff",
    "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.arange(2)],
    "nan": [float("nan"), float("-inf")],
    "large": 10**400,
    "surrogate": "\ud800",
  }
  assert json.loads(report.to_json(values)) == {
    "decimal": "1.50",
    "date": "2024-01-15",
    "bytes": "caf\xe9 \\xff",
    "numpy": [0.5, 3, True, [0, 1]],
    "nan": [None, None],
    "large": 10**400,
    "surrogate": "\ud800",
  }


def test_an_evaluation_that_ends_early_keeps_the_settings_that_were_done(tmp_path, capsys):
  place = tmp_path / "results"
  answers = [{"text": "\ud800", "answer": decimal.Decimal(1)}]
  with pytest.raises(KeyboardInterrupt), report.directory(place) as output:
    output.add("ar-1", answers, [{"mode": "ar", "by_task": {"\ud800": 1.0}}])
    raise KeyboardInterrupt
  (left,) = tmp_path.iterdir()
  assert left.name.startswith("results.unfinished-") and str(left) in capsys.readouterr().err
  (found,) = json.loads((left / "results.json").read_text())
  assert found == {"mode": "ar", "by_task": {"\ud800": 1.0}}
  assert json.loads((left / "answers-ar-1.jsonl").read_text())["answer"] == "1"
  left.rename(tmp_path / "kept")
  with report.directory(place) as output:
    output.add("ar-1", answers, [{"mode": "ar"}])
    assert not place.exists()
  assert sorted(p.name for p in place.iterdir()) == ["answers-ar-1.jsonl", "results.json"]
  with pytest.raises(UserError, match="exists and is not empty"), report.directory(place):
    pass


def test_exact_compares_numbers_where_the_column_holds_numbers():
  assert scoring.exact("Answer: 5", {"answer": 5.0})
  assert scoring.exact("Answer: 1.50", {"answer": decimal.Decimal("1.5")})
  assert not scoring.exact("Answer: 5", {"answer": "5.0"})
  assert not scoring.exact("Answer: 9007199254740993", {"answer": 9007199254740992.0})
  assert not scoring.exact("Answer: 5 or 6", {"answer": 6})
  assert scoring.exact("Answer: yes", {"answer": b"yes"})
  digits = "7" * 400
  assert scoring.numeric(f"Answer: {digits}", {"answer": digits})
  assert not scoring.numeric(f"Answer: {digits[:-1]}8", {"answer": digits})
  for missing in (None, float("nan"), b""):
    with pytest.raises(scoring.Unscorable):
      scoring.exact("Answer: None", {"answer": missing})


def test_rows_that_cannot_be_answered_are_named_and_count_as_not_solved(monkeypatch, capsys):
  rows = [{"prompt": p, "answer": a} for p, a in (("a", "a"), (None, "b"), ("c", None), ("d", "d"))]
  problems = reading.Rows(rows, [f"FILE, row {i}" for i in range(4)], frozenset(rows[0]))
  monkeypatch.setattr(
    evaluate,
    "refusals",
    lambda model, prompts, _: {i: "null" for i, p in enumerate(prompts) if not p},
  )
  refused = evaluate.unanswerable(None, problems, "prompt")
  assert list(refused) == [1, 2] and "not answered: FILE, row 1: null\n" in capsys.readouterr().err

  def generate(model, prompts, **options):
    n = len(prompts)
    numbers = {"tokens": [[0]] * n, "passes": [1] * n, "stopped": [True] * n}
    numbers |= {"prefill_seconds": 0.0, "decode_seconds": 0.0, "not_finite": bad}
    return SimpleNamespace(texts=prompts, **numbers)

  bad = []
  monkeypatch.setattr(generation, "attempt", generate)
  numbers, outcomes = evaluate.evaluate(None, rows, scoring.exact, batch_size=2, refused=refused)
  assert [o["solved"] for o in outcomes] == [True, False, False, True]
  assert [o.get("reason") for o in outcomes] == [None, "null", refused[2], None]
  assert (numbers["problems"], numbers["solved"], numbers["not_answered"]) == (4, 0.5, 2)
  bad.append(1)
  numbers, outcomes = evaluate.evaluate(None, rows, scoring.exact, batch_size=2, refused=refused)
  assert [o["solved"] for o in outcomes] == [True, False, False, False]
  assert "not finite" in outcomes[3]["reason"] and not outcomes[3]["stopped"]
  assert (numbers["solved"], numbers["not_answered"]) == (0.25, 3)
  problems = reading.Rows(rows[1:3], problems.places[1:3], problems.columns)
  with pytest.raises(UserError, match="No problem can be answered. FILE, row 1: null"):
    evaluate.unanswerable(None, problems, "prompt")


@fuzz(text=st.text("ar,exactfixedthreshold:.0129branchestailngram- e", max_size=24))
def test_any_modes_and_sizes_are_taken_or_refused(text):
  taken_or_refused(evaluate.settings, text, "4")
  taken_or_refused(evaluate.settings, "exact", text)


@fuzz(
  row=st.fixed_dictionaries({"prompt": values, "answer": values, "task": values, "meta": values})
)
def test_any_row_is_scored_or_refused_and_written(row):
  for score in (scoring.exact, scoring.numeric):
    taken_or_refused(score, "Answer: 5", row, refusals=(scoring.Unscorable,))
  report.to_json(evaluate._outcome(row, "prompt", None)).encode("utf-8", "backslashreplace")


def test_tokens_a_pass_count_rows_that_stopped(monkeypatch, tmp_path):
  """And their seconds are shared out over all."""
  answers = {"a": ("1", True, 8, 2), "b": ("x", False, 100, 10), "c": ("3", True, 4, 4)}

  def generate(model, prompts, **options):
    texts, stopped, tokens, passes = zip(*(answers[p] for p in prompts), strict=True)
    return SimpleNamespace(
      texts=texts,
      stopped=stopped,
      tokens=[[0] * n for n in tokens],
      passes=passes,
      not_finite=[],
      prefill_seconds=1.0,
      decode_seconds=2.0,
    )

  monkeypatch.setattr(generation, "attempt", generate)
  rows = [
    {"prompt": p, "answer": a, "task": t}
    for p, a, t in (("a", "1", "x"), ("b", "2", "x"), ("c", "3", "y"))
  ]
  numbers, outcomes = evaluate.evaluate(None, rows, scoring.exact, batch_size=2)
  assert numbers["tokens_per_pass"] == 12 / 6 and numbers["not_stopped"] == 1
  assert numbers["solved"] == 2 / 3 and numbers["by_task"] == {"x": 0.5, "y": 1.0}
  assert numbers["seconds_per_problem"] == 1.0 and numbers["tokens"] == 112
  report.write_answers(tmp_path, "exact-8", outcomes)
  lines = (tmp_path / "answers-exact-8.jsonl").read_text().splitlines()
  assert [json.loads(line)["solved"] for line in lines] == [True, False, True]
  results = [numbers | {"mode": "exact", "block_size": 8}]
  assert plot.accuracy(results, tmp_path / "accuracy.png")
  assert (tmp_path / "accuracy.png").stat().st_size > 5000
