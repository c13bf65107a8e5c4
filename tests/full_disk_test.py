"""Programs whose disk is full, read-only or gone: one line, status 1, what can be saved is saved.

The disk is a small tmpfs; where mounting is not allowed, nothing here runs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine_jax import records
from refine_jax.checkpoint import checkpointer, directory

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
# Far more steps than are taken before the disk is full, and everything written at each second one.
SETTINGS = [
  "--config.data.max_length=48",
  "--config.optim.batch_size=4",
  "--config.optim.total_steps=4000",
  "--config.eval.eval_every=0",
  "--config.checkpoint.save_every=2",
  "--config.checkpoint.max_ckpt_to_keep=2",
  "--config.log.every=1",
  "--config.log.debug_every=2",
]
_ROOM = 64  # MiB: a few checkpoints of the quickstart's model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """The quickstart's data."""
  place = tmp_path_factory.mktemp("runs")
  finish(place, str(ROOT / "scripts" / "make_tiny_data.py"), "data/tiny")
  return place


@pytest.fixture
def disk(tmp_path):
  """An empty disk of a few MiB."""
  disk = tmp_path / "disk"
  disk.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}m", "tmpfs", str(disk)]
  if subprocess.run(command, capture_output=True).returncode:
    pytest.skip("mounting a tmpfs is not allowed here")
  yield disk
  while disk.is_mount():
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk):
  """Leaves no room at all."""
  with open(disk / "ballast", "ab", buffering=0) as file:
    for size in (2**16, 1):
      try:
        while file.write(b"x" * size):
          pass
      except OSError:
        pass


def environment(place, **more):
  return os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "REFINE_JAX_CACHE": str(place / "cache"),
    **more,
  }


def training(workdir, *extra):
  config = f"--config={ROOT}/configs/tiny.py"
  return ["-m", "refine_jax.main", config, f"--workdir={workdir}", *SETTINGS, *extra]


def finish(place, *arguments, stdout=subprocess.PIPE, **variables):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=place,
    env=environment(place, **variables),
    stdout=stdout,
    stderr=subprocess.PIPE,
    text=True,
    timeout=300,
  )


def disturbed(place, workdir, disturb, *extra):
  """A run that is disturbed after its second step: (exit status, what it printed, its errors)."""
  # Files, because pipes that nobody reads meanwhile would hold the run up.
  paths = place / "out", place / "errors"
  with open(paths[0], "w") as out, open(paths[1], "w") as errors:
    process = subprocess.Popen(
      [sys.executable, *training(workdir, *extra)],
      cwd=place,
      env=environment(place),
      stdout=out,
      stderr=errors,
    )
    try:
      end = time.monotonic() + 200
      while "\nstep 2/" not in paths[0].read_text() and process.poll() is None:
        assert time.monotonic() < end, "it does not begin"
        time.sleep(0.01)
      if process.poll() is None:
        disturb()
      process.wait(timeout=120)  # a run that hangs or goes on fails here
    finally:
      process.kill()
      process.wait()
  return process.returncode, *(path.read_text() for path in paths)


def one_line(errors, *words):
  """Exactly one error, with these words and the room that is left."""
  assert "Traceback" not in errors
  lines = [line for line in errors.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1, errors
  assert all(word in lines[0] for word in words), lines[0]
  return lines[0]


def whole_checkpoints(workdir):
  """The steps that are there, each of which can be read."""
  steps = directory.steps(workdir / "checkpoints")
  for step in steps:
    checkpointer.restore_params(workdir, step)
  return steps


# What is written while a run goes on -> its place in the workdir.
KINDS = {
  "metrics": "metrics.jsonl",
  "tensorboard": "tensorboard",
  "debug log": "log",
  "profile": "profile",
  "export": "global_step_10",
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_full_place_ends_a_run_after_a_checkpoint(place, disk, tmp_path, kind):
  workdir = tmp_path / "run"
  mine, other = workdir / KINDS[kind], disk / "place"

  def disturb():
    fill(disk)
    if kind == "metrics":
      other.touch()
      mine.unlink()
    else:
      other.mkdir()
      shutil.rmtree(mine, ignore_errors=True)
    mine.symlink_to(other)

  extra = {
    "profile": ["--config.log.profile_steps=(40,41)"],
    "export": ["--config.checkpoint.save_hf=True"],
  }
  code, out, errors = disturbed(place, workdir, disturb, *extra.get(kind, ()))
  assert code == 1 and "done:" not in out
  line = one_line(errors, "could not be written", KINDS[kind], "GiB are free there")
  saved = whole_checkpoints(workdir)
  assert line.endswith(f"its newest checkpoint: step {saved[-1]}.")
  taken = [r["step"] for r in records.read(workdir / "metrics.jsonl")]
  if kind != "metrics":
    assert saved[-1] == taken[-1]  # nothing that was learned is lost


def test_a_full_place_of_checkpoints_ends_a_run_with_the_earlier_ones_whole(place, disk, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (disk / "checkpoints").mkdir()

  def disturb():
    fill(disk)

  (workdir / "checkpoints").symlink_to(disk / "checkpoints")
  code, out, errors = disturbed(place, workdir, disturb)
  assert code == 1 and "done:" not in out
  one_line(errors, "The checkpoint in", "could not be written", "Earlier checkpoints are whole")
  whole_checkpoints(workdir)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_workdir_that_takes_nothing_more_ends_a_run_and_it_goes_on_later(place, disk, how):
  workdir = disk / "run"

  def disturb():
    if how == "full":
      fill(disk)
    else:
      # A disk of which files are open for writing, as the run's lock is, cannot be made read-only;
      # a read-only view can be laid over it.
      for options in (["--bind", str(disk)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, str(disk)], check=True)

  code, out, errors = disturbed(place, workdir, disturb)
  assert code == 1 and "done:" not in out
  one_line(errors, "could not be written", "GiB are free there")
  if how == "read-only":
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
  (disk / "ballast").unlink(missing_ok=True)
  saved = whole_checkpoints(workdir)
  again = finish(place, *training(workdir, "--config.optim.total_steps=30"))
  assert again.returncode == 0, again.stderr
  if saved:
    assert f"resumed at step {saved[-1]}" in again.stdout
  steps = [r["step"] for r in records.read(workdir / "metrics.jsonl") if "loss_total" in r]
  assert steps == list(range(1, 31))
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [*steps, 30]  # the last is validated


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_workdir_that_is_gone_ends_a_run_and_what_is_saved_after_that_is_whole(
  place, tmp_path, how
):
  workdir = tmp_path / "run"

  def disturb():
    if how == "moved":
      workdir.rename(tmp_path / "moved")
    else:  # file by file, and what is written meanwhile may stay
      shutil.rmtree(workdir, ignore_errors=True)

  code, out, errors = disturbed(place, workdir, disturb)
  assert code == 1 and "done:" not in out
  line = one_line(errors)
  # A save that was under way when its directory went has its own words.
  assert "was removed or moved while the run went on" in line or "could not be written" in line
  saved = whole_checkpoints(workdir)
  if "its newest checkpoint: step" in line:
    assert line.endswith(f" step {saved[-1]}.")
  if how == "moved":
    assert (tmp_path / "moved" / "config.json").is_file()


def test_output_to_a_full_disk_ends_a_run_after_a_checkpoint(place, tmp_path):
  workdir = tmp_path / "run"
  with open("/dev/full", "w") as full:
    result = finish(place, *training(workdir), stdout=full)
  assert result.returncode == 1
  one_line(result.stderr, "No space left on device")


def test_a_full_disk_at_the_start_is_one_line(place, disk):
  fill(disk)
  result = finish(place, *training(disk / "run"))
  assert result.returncode == 1
  one_line(result.stderr, "No space left on device")


def test_a_full_token_cache_is_one_line(place, disk, tmp_path):
  fill(disk)
  result = finish(place, *training(tmp_path / "run"), REFINE_JAX_CACHE=str(disk))
  assert result.returncode == 1
  one_line(result.stderr, "token cache", "No space left", "GiB are free there", "cache_dir")


def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(finished, disk):
  place, workdir = finished
  fill(disk)
  script = str(ROOT / "scripts" / "export_hf.py")
  result = finish(place, script, f"--workdir={workdir}", f"--output={disk / 'out'}")
  assert result.returncode == 1
  one_line(result.stderr, "could not be written", "GiB are free there")
  assert [p.name for p in disk.iterdir()] == ["ballast"]


@pytest.fixture(scope="module")
def finished(place):
  """A run of two steps."""
  workdir = place / "finished"
  result = finish(place, *training(workdir, "--config.optim.total_steps=2"))
  assert result.returncode == 0, result.stderr
  return place, workdir


@pytest.mark.parametrize("output", ["answers", "trace", "relabelled"])
def test_results_on_a_full_disk_are_one_line_and_no_half_of_them(finished, disk, output):
  place, workdir = finished
  fill(disk)
  data = "--data=data/tiny/test.parquet"
  command = {
    "answers": ["-m", "refine_jax.evaluate", data, "--limit=2", "--modes=ar"],
    "trace": [str(ROOT / "scripts" / "sample.py"), "--prompt=next abcd"],
    "relabelled": [str(ROOT / "scripts" / "relabel.py"), data, "--batch_size=200"],
  }[output]
  where = "--html" if output == "trace" else "--output"
  more = [f"--model={workdir}", "--max_new_tokens=2", f"{where}={disk / 'out'}"]
  result = finish(place, *command, *more)
  assert result.returncode == 1
  one_line(result.stderr, "No space left")
  assert not (disk / "out").exists()
