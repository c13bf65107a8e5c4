"""The experiment's script: what it starts, its means, and a whole experiment of the quickstart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import config_fixtures
import pyarrow
import pyarrow.parquet
import pytest

from refine_jax.evaluation import evaluate

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import experiment_tasks  # noqa: E402

# Of blocks, with these options.
MODES = [
  "ar",
  "exact",
  "exact_branches@2",
  "exact_tail",
  "exact_tail@2",
  "threshold",
  "threshold_0.99_branches@2",
]
OPTIONS = [
  "--runs=runs",
  "--output=out/tasks.json",
  f"--config={ROOT}/configs/tiny.py",
  "--test=data/tiny/val.parquet",
  "--seeds=0",
  "--recipes=ar_sft,blocks,gated",
  "--block_sizes=4,2",
  "--block_size=4",
  "--max_new_tokens=8",
  "--timed=2",
  "--config.optim.total_steps=2",
  "--config.optim.batch_size=2",
  "--config.data.max_length=48",
]


def setting(mode, block, solved):
  return {
    "mode": mode,
    "block_size": block,
    "solved": solved,
    "tokens_per_pass": 2.0,
    "seconds_per_problem": 0.1,
    "not_stopped": 1,
    "problems": 50,
  }


def test_means_over_seeds_keep_the_seeds_values(tmp_path):
  results = {
    "blocks": {
      seed: [
        setting("ar", 1, solved),
        setting("exact", 8, solved),
        setting("exact", 16, solved),
        setting("exact:ngram", 8, solved),
        setting("threshold:0.9", 8, solved),
      ]
      for seed, solved in (("0", 0.5), ("1", 0.7))
    }
  }
  summary = experiment_tasks.summarise(results, 8)["blocks"]
  assert list(summary) == ["ar", "exact", "exact@16", "exact_ngram", "threshold"]
  assert summary["exact"]["solved"] == pytest.approx(0.6)
  assert summary["exact"]["seeds"]["solved"] == {"0": 0.5, "1": 0.7}
  assert summary["exact@16"]["block_size"] == 16
  assert summary["threshold"]["setting"] == "threshold:0.9"
  assert experiment_tasks.plot({"blocks": summary}, tmp_path / "tasks.png")
  assert (tmp_path / "tasks.png").stat().st_size > 10_000
  assert "60.0% (50.0% to 70.0%)" in experiment_tasks.table({"blocks": summary})


@pytest.fixture
def script(monkeypatch, capsys):
  def run(*arguments):
    """(exit status, standard output, standard error) of the script in this process."""
    monkeypatch.setattr(sys, "argv", ["experiment_tasks.py", *arguments])
    with pytest.raises(SystemExit) as end:
      experiment_tasks.main()
    printed = capsys.readouterr()
    return end.value.code or 0, printed.out, printed.err

  return run


@pytest.mark.parametrize("older", ["blocks", "best"])
def test_results_are_drawn_again_under_the_recipes_names_of_today(script, tmp_path, older):
  output = tmp_path / "tasks.json"
  summary = experiment_tasks.summarise({older: {"0": [setting("ar", 1, 0.5)]}}, 8)
  output.write_text(json.dumps(summary))
  status, out, _ = script("--redraw", f"--output={output}")
  assert status == 0 and "| blocks | ar | 1 | 50.0% | 2.00 |" in out
  assert json.loads(output.read_text()) == {"blocks": summary[older]}
  assert (tmp_path / "tasks.png").exists()
  status, _, err = script("--redraw", f"--output={output}", "--config.seed=1")
  assert status == 2 and "--config.seed=1" in err
  output.write_text("[1]")
  status, _, err = script("--redraw", f"--output={output}")
  assert status == 1 and err.startswith(f"error: {output} is no file of results")


@pytest.fixture
def commands(monkeypatch, tmp_path):
  """What the script starts, read as each program reads it; evaluations leave made-up results."""
  monkeypatch.chdir(tmp_path)
  started = []
  rows = pyarrow.table({"prompt": ["a"], "answer": ["b"]})
  Path("data/tiny").mkdir(parents=True)
  pyarrow.parquet.write_table(rows, "data/tiny/val.parquet")

  def run(command):
    assert command[0] == sys.executable
    arguments = command[3:] if command[1] == "-m" else command[2:]
    name = command[2] if command[1] == "-m" else Path(command[1]).stem
    started.append((name, READERS[name](monkeypatch, arguments)))
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(experiment_tasks.subprocess, "run", run)
  return started


def _train(monkeypatch, arguments):
  config, workdir = config_fixtures.parse_with_workdir(*arguments, config=None)
  (Path(workdir) / "checkpoints").mkdir(parents=True)
  return config


def _evaluate(monkeypatch, arguments):
  with monkeypatch.context() as patch:
    patch.setattr(sys, "argv", ["evaluate", *arguments])
    options = evaluate.parse()
  rows = [{"task": "t", "solved": True, "stopped": True, "tokens": 8, "passes": 4}]
  results = [
    {"mode": name, "block_size": choice["block_size"]} | evaluate._numbers(rows, 1, 0.5)
    for name, choice in evaluate.settings(options.modes, options.block_sizes)
  ]
  for numbers in results[1:]:
    numbers["same_text_as_ar"] = 1
  Path(options.output).mkdir()
  (Path(options.output) / "results.json").write_text(json.dumps(results))
  return options


def _export(monkeypatch, arguments):
  return dict(argument.removeprefix("--").split("=") for argument in arguments)


READERS = {"refine_jax.main": _train, "refine_jax.evaluate": _evaluate, "export_hf": _export}


def test_each_recipe_is_trained_and_evaluated_once(script, commands, tmp_path):
  status, out, err = script(*OPTIONS)
  assert status == 0, err
  train, evaluation = "refine_jax.main", "refine_jax.evaluate"
  assert [name for name, _ in commands] == [train, evaluation] * 2 + [
    "export_hf",
    train,
    evaluation,
    evaluation,
    evaluation,
  ]
  blocks, gated = commands[2][1], commands[5][1]
  assert blocks.noise.kind == "block" and blocks.objective.clean_weight > 0
  assert (blocks.seed, blocks.optim.total_steps, blocks.data.max_length) == (0, 2, 48)
  assert gated.adapter.kind == "gated" and gated.model.pretrained == commands[4][1]["output"]
  for _, timed in commands[-2:]:
    assert (timed.batch_size, timed.limit, timed.dtype) == (1, 2, "bfloat16")
  summary = json.loads((tmp_path / "out" / "tasks.json").read_text())
  assert list(summary) == ["ar_sft", "blocks", "gated"]
  assert list(summary["blocks"]) == MODES
  assert summary["gated"]["exact"]["same_text_as_base"] == 1
  assert (tmp_path / "out" / "tasks.png").exists() and "times as fast as ar" in out
  timed = json.loads((tmp_path / "out" / "tasks_one_at_a_time.json").read_text())
  assert timed["gated"]["speedup"] == {"exact": 1.0, "exact_branches@2": 1.0}
  count = len(commands)
  assert script(*OPTIONS)[0] == 0 and len(commands) == count


def test_a_recipe_that_is_none_is_refused(script, commands):
  status, _, err = script(*OPTIONS, "--recipes=best")
  assert status == 1 and "uniform, blocks, gated, ar_sft" in err
  assert err.startswith("error: ") and not commands


@pytest.mark.slow
def test_the_script_trains_evaluates_and_goes_on(tmp_path):
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "REFINE_JAX_CACHE": str(tmp_path / "cache"),
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
  }

  def script(*arguments):
    return subprocess.run(
      [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

  script(str(ROOT / "scripts/make_tiny_data.py"), "data/tiny")
  command = [str(ROOT / "scripts/experiment_tasks.py"), *OPTIONS]
  first = script(*command)
  assert first.returncode == 0, first.stderr
  summary = json.loads((tmp_path / "out" / "tasks.json").read_text())
  assert list(summary) == ["ar_sft", "blocks", "gated"]
  gated = summary["gated"]["exact"]
  assert gated["same_text_as_base"] == gated["problems"]
  assert gated["solved"] == summary["ar_sft"]["ar"]["solved"]
  assert gated["tokens_per_pass"] >= 1
  assert list(summary["blocks"]) == MODES
  config = json.loads((tmp_path / "runs" / "blocks-0" / "config.json").read_text())
  assert config["noise"]["kind"] == "block" and config["objective"]["clean_weight"] > 0
  again = script(*command)
  assert (tmp_path / "out" / "tasks.png").exists() and "times as fast as ar" in first.stdout
  timed = json.loads((tmp_path / "out" / "tasks_one_at_a_time.json").read_text())
  assert list(timed) == ["blocks", "gated"]
  for numbers in timed.values():
    seconds = numbers["seconds_per_problem"]
    assert numbers["speedup"] == {
      name: seconds["ar"] / seconds[name] for name in ("exact", "exact_branches@2")
    }
  assert "done: step" not in again.stdout and "| blocks | exact:branches | 4 |" in again.stdout
