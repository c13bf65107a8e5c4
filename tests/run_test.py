"""Whole runs as processes: resume, signals, what is printed and written."""

import signal
import subprocess
import time

import pytest
from run_fixtures import (
  assert_equal_trees,
  command,
  environment,
  make_data,
  parameters,
  records,
  train_process,
)

from refine_jax.checkpoint import checkpointer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs")
  make_data(directory)
  return directory


@pytest.fixture(scope="module")
def finished(place):
  """A run that nothing disturbed, and what it printed."""
  result = train_process(place, place / "finished")
  return place / "finished", result.stdout


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
  assert "complete" in train_process(place, workdir).stdout
  assert_equal_trees(parameters(workdir), before)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(place, finished):
  workdir, kills = place / "killed", 0
  for patience in (0.05, 0.5):  # kill_test.py, which is slow, has twenty
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
  train_process(place, workdir)
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
  again = train_process(place, workdir)
  assert f"resumed at step {stopped[0]}" in again.stdout and "read from" in again.stdout
  assert_equal_trees(parameters(workdir), parameters(finished[0]))


def test_resume_path_goes_on_from_another_run(place, finished):
  source = finished[0] / "checkpoints" / "2"
  workdir = place / "branched"
  result = train_process(
    place,
    workdir,
    "--config.checkpoint.resume_mode=resume_path",
    f"--config.checkpoint.resume_from_path={source}",
  )
  assert f"resumed from {source}" in result.stdout
  assert_equal_trees(parameters(workdir), parameters(finished[0]))
