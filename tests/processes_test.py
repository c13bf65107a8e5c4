"""Several real processes of one run: the same rows, numbers and files as one process."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_fixtures import (
  ROOT,
  Ended,
  assert_equal_trees,
  environment,
  make_data,
  parameters,
  records,
)

from refine_jax.checkpoint import checkpointer

LOSSES = ("loss_s0", "loss_s1", "loss_total", "grad_norm")
KILLS = 20
PROBLEMS = ("file=data/tiny/test.parquet", "every=3", "rows=2", "tokens=4")
# Only training: validation and the debug log are programs of their own.
BARE = ("--config.data.val_files=", "--config.log.debug_every=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  directory = tmp_path_factory.mktemp("processes")
  make_data(directory)
  shape = directory / "data" / "tiny" / "model" / "config.json"
  small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
  shape.write_text(json.dumps(json.loads(shape.read_text()) | small))
  return directory


def run_of(workdir, mesh, *extra) -> list[str]:
  data, fsdp, tensor = mesh
  return [
    f"--config={ROOT}/configs/tiny.py",
    f"--workdir={workdir}",
    f"--config.mesh.data={data}",
    f"--config.mesh.fsdp={fsdp}",
    f"--config.mesh.tensor={tensor}",
    "--config.data.max_length=32",
    "--config.optim.batch_size=8",
    "--config.optim.accumulation=2",
    "--config.optim.total_steps=3",
    "--config.eval.eval_every=0",
    "--config.log.every=1",
    "--config.log.debug_every=2",
    "--config.log.logger=('console',)",
    *extra,
  ]


def start(place, count, runs, *others) -> list[subprocess.Popen]:
  """Starts so many processes, each with one device.

  Args:
    runs: of the first process, and of each where no others are given.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
  worker = str(Path(__file__).with_name("processes_worker.py"))
  return [
    subprocess.Popen(
      [
        sys.executable,
        worker,
        address,
        str(count),
        str(index),
        json.dumps([runs, *others][index if others else 0]),
      ],
      cwd=place,
      env=environment(place) | {"XLA_FLAGS": flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def ends(processes, check=True) -> list[Ended]:
  """How each of them ended."""
  try:
    outputs = [process.communicate(timeout=200) for process in processes]
  finally:
    for process in processes:
      process.kill()
  result = [Ended(p.returncode, *o) for p, o in zip(processes, outputs, strict=True)]
  assert not check or all(e.returncode == 0 for e in result), [e.stderr for e in result]
  return result


def fed(workdir, count) -> list[list]:
  """For each batch the first example of each row; every copy of a row must be the same."""
  parts = [json.loads((workdir / f"rows-{i}.json").read_text()) for i in range(count)]
  batches = []
  for shards in zip(*parts, strict=True):
    rows: dict = {}
    for first, ids in (shard for process in shards for shard in process):
      for column, row in enumerate(np.transpose(ids).tolist(), first):
        assert rows.setdefault(column, row) == row
    batches.append(np.transpose([rows[i] for i in sorted(rows)]).ravel().tolist())
  return batches


@pytest.fixture(scope="module")
def alone(place):
  """One process with one device, a checkpoint each step."""
  ends(start(place, 1, [run_of("alone", (1, 1, 1), "--config.checkpoint.save_every=1")]))
  return place / "alone"


@pytest.fixture(scope="module")
def pair(place, alone):
  """Two processes of one device: over data, tensor and, from the first step of `alone`, fsdp."""
  keep_step(alone, place / "over-fsdp", 1)
  runs = [
    run_of("over-data", (2, 1, 1), *BARE),
    run_of("over-tensor", (1, 1, 2), "--config.checkpoint.save_every=1"),
    run_of("over-fsdp", (1, 2, 1), *BARE, "--config.optim.accumulation=1"),
  ]
  return ends(start(place, 2, runs))


def keep_step(workdir, copy, step):
  """A copy of a run that ended after this step, without what was written of its batches."""
  shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("rows-*.json", ".lock"))
  for other in set(checkpointer.steps(copy / "checkpoints")) - {step}:
    shutil.rmtree(copy / "checkpoints" / str(other))


def check_same_run(workdir, count, alone, first=1):
  """What was fed and the losses of each step from `first` on, against one process."""
  assert fed(workdir, count) == fed(alone, 1)[first - 1 :]
  ours, theirs = ({r["step"]: r for r in records(w) if "loss_total" in r} for w in (workdir, alone))
  assert ours.keys() == theirs.keys() == {1, 2, 3}
  for step in range(first, 4):
    for name in LOSSES:
      np.testing.assert_allclose(ours[step][name], theirs[step][name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name, first", [("data", 1), ("tensor", 1), ("fsdp", 2)])
def test_each_axis_across_two_processes_trains_as_one_process_does(place, alone, pair, name, first):
  check_same_run(place / f"over-{name}", 2, alone, first)


def test_validation_and_the_debug_log_are_the_same_and_all_is_said_once(place, alone, pair):
  both = alone, place / "over-tensor"
  logs = [(workdir / "log" / "debug.log").read_text() for workdir in both]
  assert logs[0] == logs[1] and logs[0].count("=== step") == 2
  [one], [two] = ([r for r in records(w) if "eval/loss_total" in r] for w in both)
  for name, value in one.items():
    np.testing.assert_allclose(two[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
  first, second = pair
  assert first.stdout.count("\nstart  ") == 3
  assert "start  " not in second.stdout and "step 1/3" not in second.stdout


def test_a_run_goes_on_with_another_number_of_processes_mesh_and_accumulation(place, alone, pair):
  assert f"resumed at step 1 from {place}/over-fsdp" in pair[0].stdout  # from one process to two
  before = parameters(place / "over-tensor", 2)
  keep_step(place / "over-tensor", place / "back", 2)  # and from two to one
  [ended] = ends(start(place, 1, [run_of("back", (1, 1, 1), *BARE)]))
  assert "resumed at step 2" in ended.stdout
  check_same_run(place / "back", 1, alone, 3)
  assert_equal_trees(parameters(place / "back", 2), before)
  assert not list(place.rglob("*.damaged"))


@pytest.mark.slow
def test_two_axes_across_four_processes_train_as_one_process_does(place, alone):
  meshes = {"data-fsdp": (2, 2, 1), "data-tensor": (2, 1, 2), "fsdp-tensor": (1, 2, 2)}
  runs = [run_of(name, mesh, *BARE) for name, mesh in meshes.items()]
  runs[-1] += [f"--config.eval.generate_{key}" for key in PROBLEMS]
  keep_step(alone, place / "to-four", 2)
  ends(start(place, 4, [*runs, run_of("to-four", (1, 2, 2), *BARE)]))
  for name in meshes:
    check_same_run(place / name, 4, alone)
  assert [r["step"] for r in records(place / "fsdp-tensor") if "eval/solved" in r] == [3]
  check_same_run(place / "to-four", 4, alone, 3)


def wait_for(workdir, step, processes):
  """Until these processes, which were just started, have written the metrics of this step."""
  metrics, begin = workdir / "metrics.jsonl", time.time()
  while time.time() < begin + 300 and all(p.poll() is None for p in processes):
    if metrics.exists() and metrics.stat().st_mtime > begin:
      with contextlib.suppress(ValueError):  # a line that is being written
        if any(r["step"] >= step for r in records(workdir)):
          return
    time.sleep(0.05)
  raise AssertionError([p.communicate() for p in processes if p.poll() is not None])


LONG = (*BARE, "--config.optim.total_steps=100000")


def test_an_interrupt_of_one_process_ends_all_after_the_same_step_and_saves_once(place):
  workdir = place / "long"
  processes = start(place, 2, [run_of("long", (2, 1, 1), *LONG)])
  wait_for(workdir, 3, processes)
  processes[1].send_signal(signal.SIGINT)
  first, second = ends(processes, check=False)
  assert (first.returncode, second.returncode) == (128 + signal.SIGTERM, 128 + signal.SIGINT)
  [saved] = checkpointer.steps(workdir / "checkpoints")
  assert f"stopped by SIGTERM after step {saved}; checkpoint saved." in first.stdout


@pytest.mark.slow
def test_kills_of_one_of_two_processes_at_random_moments_change_no_bit(place):
  options = (*BARE, "--config.optim.total_steps=200", "--config.checkpoint.save_every=5")
  whole, run = (run_of(name, (2, 1, 1), *options) for name in ("whole", "killed"))
  ends(start(place, 2, [whole]))
  checkpoints, generator, killed = place / "killed" / "checkpoints", random.Random(0), 0
  for _ in range(3 * KILLS):
    newest = max(checkpointer.steps(checkpoints), default=0)
    processes, victim = start(place, 2, [run]), generator.randrange(2)
    wait_for(place / "killed", newest + 1, processes)
    time.sleep(4 * generator.random())
    processes[victim].kill()
    begin, ended = time.monotonic(), ends(processes, check=False)
    assert time.monotonic() - begin < 110
    if ended[victim].returncode == 0:  # It was complete: train its last steps once more.
      newest = max(checkpointer.steps(checkpoints))
      (checkpoints / str(newest)).rename(place / f"aside-{newest}-{generator.random()}")
      continue
    killed += 1
    if victim == 1:
      # The other lines are those of JAX's own log.
      [line] = [x for x in ended[0].stderr.splitlines() if not re.match(r"[EWI]\d{4} ", x)]
      assert ended[0].returncode == 1
      assert line.startswith(("error: An operation over all 2", "error: process 1 of 2 has not"))
    if killed == KILLS:
      break
  assert killed == KILLS
  first, _ = ends(start(place, 2, [run]))
  assert "resumed at step " in first.stdout
  assert_equal_trees(parameters(place / "killed", 200), parameters(place / "whole", 200))
  assert not list(checkpoints.glob("*.damaged"))


def test_an_error_of_one_process_ends_the_others_with_it(place):
  run = run_of("apart", (2, 1, 1), *BARE)
  other = [*run, "--config.data.train_files=none.parquet"]
  first, second = ends(start(place, 2, [run], [other]), check=False)
  assert "none.parquet" in second.stderr and (first.returncode, second.returncode) == (1, 1)
  assert "error: process 1 of 2 has ended: " in first.stderr and "none.parquet" in first.stderr
