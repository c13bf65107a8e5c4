"""Whole runs through the command line: resume, signals, bad input, export, sampling."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from refine_jax.checkpoint import checkpointer

ROOT = Path(__file__).parents[1]
# One directory of data and one of compiled steps for all runs of this file.
SETTINGS = [
  "--config.data.max_length=48",
  "--config.optim.batch_size=4",
  "--config.optim.total_steps=6",
  "--config.eval.eval_every=4",
  "--config.checkpoint.save_every=2",
  "--config.log.every=1",
  "--config.log.debug_every=3",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """The quickstart's data, cut down."""
  directory = tmp_path_factory.mktemp("runs")
  script(directory, "scripts/make_tiny_data.py", "data/tiny")
  data = directory / "data" / "tiny"
  table = pyarrow.parquet.read_table(data / "train.parquet")
  pyarrow.parquet.write_table(table[:200], data / "train.parquet", row_group_size=50)
  return directory


def environment(directory):
  return os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "REFINE_JAX_CACHE": str(directory / "cache"),
  }


def script(directory, *arguments, check=True):
  command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
  result = subprocess.run(
    command, cwd=directory, env=environment(directory), capture_output=True, text=True
  )
  assert not check or result.returncode == 0, result.stderr
  return result


def command(workdir, *extra):
  config = f"--config={ROOT}/configs/tiny.py"
  return [
    sys.executable,
    "-m",
    "refine_jax.main",
    config,
    f"--workdir={workdir}",
    *SETTINGS,
    *extra,
  ]


def train(place, workdir, *extra, check=True):
  result = subprocess.run(
    command(workdir, *extra), cwd=place, env=environment(place), capture_output=True, text=True
  )
  assert not check or result.returncode == 0, result.stderr
  return result


@pytest.fixture(scope="module")
def finished(place):
  """A run that nothing disturbed, and what it printed."""
  result = train(place, place / "finished")
  return place / "finished", result.stdout


def parameters(workdir, step=6):
  return checkpointer.restore_params(workdir, step)[0]


def assert_equal_trees(a, b):
  assert a.keys() == b.keys()
  for name in a:
    if isinstance(a[name], dict):
      assert_equal_trees(a[name], b[name])
    else:
      np.testing.assert_array_equal(a[name], b[name])


def records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_prints_and_writes_what_it_should(finished):
  workdir, out = finished
  for word in ("mesh", "parameters", "micro-batches", "filled", "warm-up", "start         scratch"):
    assert word in out
  assert "step 6/6  loss_s0" in out and "eval step 4/6" in out and "done: step 6" in out
  lines = records(workdir)
  training = [r for r in lines if "loss_total" in r]
  assert [r["step"] for r in training] == [1, 2, 3, 4, 5, 6]
  wanted = {"loss_s0", "loss_s1", "grad_norm", "lr", "noise_mean", "accuracy_s1_corrupted"}
  assert all(wanted <= r.keys() for r in training)
  assert [r["step"] for r in lines if "eval/loss_s0" in r] == [4, 6]
  assert any(key.startswith("eval/noise_0.10") for r in lines for key in r)
  assert list((workdir / "tensorboard").iterdir())
  debug = (workdir / "log" / "debug.log").read_text()
  assert "=== step 0" in debug and "=== step 3" in debug
  assert all(f"\n{name} " in debug for name in ("prompt", "t0", "s0", "s1", "out"))
  assert checkpointer.steps(workdir / "checkpoints") == [2, 4, 6]


def test_a_finished_run_started_again_does_nothing(place, finished):
  workdir, _ = finished
  before = parameters(workdir)
  assert "complete" in train(place, workdir).stdout
  assert_equal_trees(parameters(workdir), before)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(place, finished):
  workdir, kills = place / "killed", 0
  for patience in (0.2, 0.5, 0.05, 0.9):
    process = subprocess.Popen(
      command(workdir), cwd=place, env=environment(place), stdout=subprocess.PIPE, text=True
    )
    # From the first step on, at different moments of steps and saves.
    for line in process.stdout:
      if line.startswith("step "):
        time.sleep(patience)
        process.kill()
        break
    process.stdout.close()
    kills += process.wait() == -signal.SIGKILL
  assert kills
  train(place, workdir)
  assert_equal_trees(parameters(workdir), parameters(finished[0]))


def test_sigterm_saves_and_the_next_start_goes_on(place, finished):
  workdir = place / "terminated"
  process = subprocess.Popen(
    command(workdir, "--config.checkpoint.save_every=100"),
    cwd=place,
    env=environment(place),
    stdout=subprocess.PIPE,
    text=True,
  )
  out = ""
  for line in process.stdout:
    out += line
    if line.startswith("compiled"):
      process.send_signal(signal.SIGTERM)
  process.stdout.close()
  assert process.wait() == 128 + signal.SIGTERM
  assert "stopped by SIGTERM after step" in out
  stopped = checkpointer.steps(workdir / "checkpoints")
  assert len(stopped) == 1 and stopped[0] < 6
  again = train(place, workdir)
  assert f"resumed at step {stopped[0]}" in again.stdout and "read from" in again.stdout
  assert_equal_trees(parameters(workdir), parameters(finished[0]))


def test_resume_path_goes_on_from_another_run(place, finished):
  source = finished[0] / "checkpoints" / "2"
  workdir = place / "branched"
  result = train(
    place,
    workdir,
    "--config.checkpoint.resume_mode=resume_path",
    f"--config.checkpoint.resume_from_path={source}",
  )
  assert f"resumed from {source}" in result.stdout
  assert_equal_trees(parameters(workdir), parameters(finished[0]))


def test_export_reload_and_sample(place, finished):
  output = place / "exported"
  script(place, "scripts/export_hf.py", f"--workdir={finished[0]}", f"--output={output}")
  assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
    p.name for p in output.iterdir()
  }
  card = (output / "README.md").read_text()
  assert "loss_s1" in card and '"num_iterations": 2' in card
  again = script(
    place, "scripts/export_hf.py", f"--workdir={finished[0]}", f"--output={output}", check=False
  )
  assert again.returncode == 1 and "is not empty" in again.stderr
  for model in (output, finished[0]):
    result = script(
      place, "scripts/sample.py", f"--model={model}", "--prompt=next abcd", "--max_new_tokens=5"
    )
    assert "Traceback" not in result.stderr


def test_a_run_in_blocks_answers_problems_and_writes_every_checkpoint_for_transformers(place):
  workdir = place / "with_hf"
  result = train(
    place,
    workdir,
    "--config.checkpoint.save_hf=True",
    "--config.optim.total_steps=3",
    "--config.noise.kind=block",
    "--config.noise.block_size=3",
    "--config.objective.clean_weight=0.5",
    "--config.eval.generate_every=2",
    "--config.eval.generate_file=data/tiny/test.parquet",
    "--config.eval.generate_rows=3",
    "--config.eval.generate_tokens=8",
  )
  assert "loss_clean" in result.stdout
  answered = [r for r in records(workdir) if "eval/solved" in r]
  assert [r["step"] for r in answered] == [2, 3]
  assert all(r["eval/tokens_per_pass"] >= 0 and r["eval/not_stopped"] <= 3 for r in answered)
  blocks = [r for r in records(workdir) if "eval/block/run_s0" in r]
  assert blocks and "eval/block/accuracy_s2/offset_2" in blocks[0]
  assert not any(key.startswith("eval/noise_") for r in blocks for key in r)
  import transformers

  transformers.AutoModelForCausalLM.from_pretrained(workdir / "global_step_2" / "huggingface")


def test_from_pretrained_weights(place, finished):
  output = place / "to_start_from"
  script(
    place,
    "scripts/export_hf.py",
    f"--workdir={finished[0]}",
    f"--output={output}",
    "--dtype=float32",
  )
  result = train(
    place,
    place / "second",
    f"--config.model.pretrained={output}",
    "--config.model.config=",
    "--config.optim.total_steps=2",
    "--config.optim.lr=0.0",
  )
  assert "pretrained weights" in result.stdout
  assert_equal_trees(parameters(place / "second", 2), parameters(finished[0]))


def test_many_nonfinite_steps_in_a_row_stop_the_run(place):
  result = train(
    place,
    place / "diverged",
    "--config.optim.lr=1e30",
    "--config.optim.max_nonfinite=2",
    "--config.optim.clip_grad=0.0",
    "--config.optim.total_steps=30",
    check=False,
  )
  assert result.returncode == 1
  assert "not finite for 2 steps in a row" in result.stderr and "Step " in result.stderr
  assert all(np.isfinite(parameters(place / "diverged", None)["embedding"]).ravel()[:5])


BAD = {
  "mistyped key": (["--config.optim.lrr=1.0"], "lr"),
  "wrong type": (["--config.optim.batch_size=many"], "batch_size"),
  "weights": (["--config.objective.loss_weights=(1.0,)"], "loss_weights has 1 values"),
  "noise order": (["--config.noise.noise_min=0.95"], "noise_min=0.95 and noise_max=0.9"),
  "noise range": (["--config.noise.noise_max=1.5"], "noise_max=1.5"),
  "micro-batches": (["--config.optim.accumulation=3"], "not divisible"),
  "devices": (["--config.mesh.fsdp=3", "--config.mesh.data=1"], "needs 3 devices"),
  "no file": (["--config.data.train_files=gone.parquet"], "correct config.data.train_files"),
  "no column": (["--config.data.prompt_key=question"], "prompt, target"),
  "not parquet": (["--config.data.train_files=data/tiny/model/config.json"], "config.json"),
  "choice": (["--config.data.truncation=middle"], "error, left, right"),
  "noise kind": (["--config.noise.kind=blocks"], "'block'"),
  "problems": (["--config.eval.generate_every=2"], "generate_file go together"),
  "mistyped section": (["--config.optm.lr=1.0"], "did you mean 'optim'?"),
  "no config file": (["--config=nowhere.py"], "nowhere.py"),
  "no recipe": (
    [f"--config={ROOT}/configs/tiny.py:block"],
    "one of uniform, blocks, gated, ar_sft",
  ),
  "no model": (["--config.model.config=nowhere/at/all/"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_one(place, case):
  arguments, message = BAD[case]
  result = train(place, place / "bad", *arguments, check=False)
  assert result.returncode == 1, result.stdout
  assert "Traceback" not in result.stderr
  errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1 and message in errors[0], result.stderr
  assert not (place / "bad" / "checkpoints").exists()


def test_another_models_workdir_is_refused_and_left_alone(place, finished):
  other = place / "other_model"
  other.mkdir()
  for file in (place / "data" / "tiny" / "model").iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
  before = (finished[0] / "config.json").read_text()
  result = train(place, finished[0], f"--config.model.config={other}", check=False)
  assert result.returncode == 1 and "is of another model" in result.stderr
  assert (finished[0] / "config.json").read_text() == before


def test_a_used_workdir_is_refused_where_resuming_is_off(place, finished):
  result = train(place, finished[0], "--config.checkpoint.resume_mode=disable", check=False)
  assert result.returncode == 1 and "resume_mode" in result.stderr


def test_all_rows_dropped(place):
  path = place / "empty.parquet"
  table = pyarrow.table({"prompt": ["a", None, "b"], "target": ["", "x", None]})
  pyarrow.parquet.write_table(table, path)
  result = train(place, place / "bad", f"--config.data.train_files={path}", check=False)
  assert result.returncode == 1 and "empty.parquet" in result.stderr
