"""The experiment's script, end to end on the quickstart's model, and its means."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import experiment_tasks  # noqa: E402


def test_means_over_seeds_keep_the_seeds_values(tmp_path):
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
  summary = experiment_tasks.summarise(results, 8)["best"]
  assert list(summary) == ["ar", "exact", "exact@16", "exact_ngram", "threshold"]
  assert summary["exact"]["solved"] == pytest.approx(0.6)
  assert summary["exact"]["seeds"]["solved"] == {"0": 0.5, "1": 0.7}
  assert summary["exact@16"]["block_size"] == 16
  assert summary["threshold"]["setting"] == "threshold:0.9"
  assert experiment_tasks.plot({"best": summary}, tmp_path / "tasks.png")
  assert (tmp_path / "tasks.png").stat().st_size > 10_000
  assert "60.0% (50.0% to 70.0%)" in experiment_tasks.table({"blocks": summary})


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
  command = [
    str(ROOT / "scripts/experiment_tasks.py"),
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
  first = script(*command)
  assert first.returncode == 0, first.stderr
  summary = json.loads((tmp_path / "out" / "tasks.json").read_text())
  assert list(summary) == ["ar_sft", "best", "gated"]
  gated = summary["gated"]["exact"]
  assert (
    gated["same_text_as_base"] == gated["problems"]
    and gated["solved"] == summary["ar_sft"]["ar"]["solved"]
  )
  assert gated["tokens_per_pass"] >= 1
  assert list(summary["best"]) == [
    "ar",
    "exact",
    "exact_branches@2",
    "exact_tail",
    "exact_tail@2",
    "threshold",
    "threshold_0.99_branches@2",
  ]
  config = json.loads((tmp_path / "runs" / "blocks-0" / "config.json").read_text())
  assert config["noise"]["kind"] == "block" and config["objective"]["clean_weight"] > 0
  again = script(*command)
  assert (tmp_path / "out" / "tasks.png").exists() and "times as fast as ar" in first.stdout
  timed = json.loads((tmp_path / "out" / "tasks_one_at_a_time.json").read_text())
  assert list(timed) == ["best", "gated"]
  for numbers in timed.values():
    seconds = numbers["seconds_per_problem"]
    assert numbers["speedup"] == {
      name: seconds["ar"] / seconds[name] for name in ("exact", "exact_branches@2")
    }
  assert "done: step" not in again.stdout and "| best | exact:branches | 4 |" in again.stdout
  bad = script(*command, "--recipes=best")
  assert bad.returncode == 1 and "uniform, blocks, gated, ar_sft" in bad.stderr
  assert "Traceback" not in bad.stderr
