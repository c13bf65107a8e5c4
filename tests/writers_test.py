"""metrics.jsonl and TensorBoard's files over restarts, and writers that cannot write."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax import cli, files, interrupt, records
from refine_jax.checkpoint import directory
from refine_jax.config import LogConfig, from_config_dict
from refine_jax.errors import UserError
from refine_jax.hf import card
from refine_jax.training import debug_log, metrics, train

ROOT = Path(__file__).parents[1]


def log_config(*loggers):
  return LogConfig(
    every=1,
    debug_every=0,
    logger=loggers,
    project_name="",
    experiment_name="",
    profile_steps=(0, 0),
  )


def writers(workdir, first=0, total=4, loggers=("tensorboard",)):
  workdir.mkdir(exist_ok=True)
  return metrics.Writers(workdir, log_config(*loggers), {}, first=first, total=total)


def part(workdir, first, last, total=4, value=0.5):
  """A run's part: steps first + 1 .. last, every second of them validated."""
  mine = writers(workdir, first, total)
  for step in range(first + 1, last + 1):
    mine.write(step, {"loss_total": value})
    if step % 2 == 0:
      mine.write(step, {"eval/loss_total": value})
  mine.close()
  assert mine.failure is None


def shown(workdir, tag):
  """(step, value) as TensorBoard shows them: a START hides earlier points from its step on."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  points = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size = struct.unpack_from("<Q", data, at)[0]
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 16 + size
      if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
        points = [p for p in points if p[0] < event.step]
      points += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
  return points


def steps_of(workdir, name):
  return [r["step"] for r in records.read(workdir / "metrics.jsonl") if name in r]


def full_at(monkeypatch, *names):
  """Files of these names can be opened and not be written, as on a full disk."""
  plain = open

  def opened(path, mode="r", **more):
    full = any(name in str(path) for name in names) and mode[0] in "aw"
    return plain("/dev/full" if full else path, mode, **more)

  for module in (records, debug_log, metrics.sinks):
    monkeypatch.setattr(module, "open", opened, raising=False)


@pytest.mark.parametrize("killed_at", [2, 3, 4])
def test_a_restart_shows_every_step_once_with_its_newest_value(tmp_path, killed_at):
  """The checkpoint is of step 2, and the run is killed there or later."""
  part(tmp_path, 0, killed_at, value=0.25)
  part(tmp_path, 2, 4, value=0.5)
  wanted = [(1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5)]
  assert shown(tmp_path, "loss_total") == wanted
  assert shown(tmp_path, "eval/loss_total") == [(2, 0.25), (4, 0.5)]
  lines = records.read(tmp_path / "metrics.jsonl")
  assert [(r["step"], r["loss_total"]) for r in lines if "loss_total" in r] == wanted
  assert steps_of(tmp_path, "eval/loss_total") == [2, 4]


def test_records_that_are_written_again_are_kept_aside(tmp_path):
  part(tmp_path, 0, 4, value=0.25)
  part(tmp_path, 2, 4, value=0.5)
  aside = records.read(tmp_path / "log" / "metrics_replaced.jsonl")
  assert [r["step"] for r in aside] == [3, 4, 4]
  assert all(0.25 in r.values() for r in aside)


def test_a_complete_run_started_again_leaves_its_files_as_they_are(tmp_path):
  def contents():
    return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

  part(tmp_path, 0, 4)
  before = contents()
  part(tmp_path, 4, 4)
  assert contents() == before


def test_what_a_complete_run_still_owed_is_added(tmp_path):
  part(tmp_path, 0, 3)
  mine = writers(tmp_path, first=3, total=3)
  mine.write(3, {"eval/loss_total": 0.5})
  mine.close()
  assert steps_of(tmp_path, "eval/loss_total") == [2, 3]
  assert [step for step, _ in shown(tmp_path, "loss_total")] == [1, 2, 3]


@pytest.mark.parametrize(
  "rest", [b'{"step": 2, "loss_to', b"\x00\x00\x00", b'{"step": 2}', b"\xff"]
)
def test_half_a_line_swallows_no_record(tmp_path, rest):
  part(tmp_path, 0, 1)
  path = tmp_path / "metrics.jsonl"
  with open(path, "ab") as file:
    file.write(rest)
  assert steps_of(tmp_path, "loss_total") == [1]
  part(tmp_path, 1, 2)
  lines = path.read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]


def test_a_model_card_passes_over_what_is_no_record(tmp_path):
  good = [{"step": 1, "loss_s0": 0.5}, {"step": 3, "loss_s0": 0.125}]
  lines = [json.dumps(record) for record in good]
  text = "\n".join([lines[0], "[1]", "7", '{"loss_s0": 9}', '{"step": "2"}', lines[1], '{"st'])
  (tmp_path / "metrics.jsonl").write_text(text)
  assert "| loss_s0 | 0.5000 |" in card._metric_lines(tmp_path / "metrics.jsonl", 2)
  assert "| loss_s0 | 0.1250 |" in card._metric_lines(tmp_path / "metrics.jsonl", 3)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tfevents"])
def test_a_writer_on_a_full_disk_neither_blocks_nor_stops_the_others(tmp_path, monkeypatch, name):
  mine = writers(tmp_path)
  mine.write(1, {"loss_total": 0.5})
  full_at(monkeypatch, name)
  for step in range(2, 100):  # more than any queue holds
    mine.write(step, {"loss_total": 0.5})
  mine.close()
  place = tmp_path / ("metrics.jsonl" if name == "metrics.jsonl" else "tensorboard")
  assert f"{place} could not be written (No space left on device)" in str(mine.failure)
  assert "GiB are free there" in str(mine.failure)
  whole = shown(tmp_path, "loss_total") if name == "metrics.jsonl" else steps_of(tmp_path, "step")
  assert len(whole) == 99


def test_a_workdir_removed_while_running_is_named_and_not_made_again(tmp_path):
  mine = writers(tmp_path / "run")
  shutil.rmtree(tmp_path / "run")
  mine.write(1, {"loss_total": 0.5})
  mine.close()
  assert "run/metrics.jsonl could not be written (No such file or directory" in str(mine.failure)
  with pytest.raises(OSError):
    debug_log.append(tmp_path / "run", "text")
  assert not (tmp_path / "run").exists()


def test_files_removed_while_running_are_begun_again(tmp_path):
  mine = writers(tmp_path)
  mine.write(1, {"loss_total": 0.5})
  (tmp_path / "metrics.jsonl").unlink()
  shutil.rmtree(tmp_path / "tensorboard")
  mine.write(2, {"loss_total": 0.5})
  mine.close()
  assert mine.failure is None and steps_of(tmp_path, "loss_total") == [2]
  assert shown(tmp_path, "loss_total") == [(2, 0.5)]


def test_what_cannot_be_written_at_the_start_is_one_line(tmp_path):
  (tmp_path / "tensorboard").write_text("in the way")
  with pytest.raises(UserError, match="tensorboard could not be written"):
    writers(tmp_path)


def test_output_that_nobody_takes_ends_no_run_without_a_checkpoint(tmp_path, monkeypatch):
  mine = writers(tmp_path, loggers=("console",))
  with open("/dev/full", "w") as full:
    monkeypatch.setattr(sys, "stdout", full)
    for step in (1, 2):
      mine.write(step, {"loss_total": 0.5})
    mine.close()
    monkeypatch.undo()
    with pytest.raises(OSError):
      full.close()
  assert "output could not be written (No space left on device)" in str(mine.failure)
  assert steps_of(tmp_path, "loss_total") == [1, 2]


class _Wandb(types.ModuleType):
  """Takes what wandb takes, and fails where it is told to."""

  def __init__(self, fails):
    super().__init__("wandb")
    self.calls, self._fails = [], fails
    for name in ("init", "log", "finish"):
      setattr(self, name, lambda *args, _name=name, **more: self._call(_name, args, more))

  def _call(self, name, args, more):
    self.calls.append((name, args, more))
    if name == self._fails:
      raise RuntimeError("the service is gone\nTraceback")
    return self


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_wandb_that_fails_hides_nothing_and_is_one_line(tmp_path, monkeypatch, fails):
  wandb = _Wandb(fails)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  mine = writers(tmp_path, loggers=("wandb",))
  mine.write(1, {"loss_total": 0.5})
  mine.close()
  assert str(mine.failure).startswith("wandb failed (the service is gone);")
  assert steps_of(tmp_path, "loss_total") == [1]


def test_a_workdir_stays_one_run_of_wandb(tmp_path, monkeypatch):
  wandb = _Wandb(None)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for cut in (False, False, True):
    writers(tmp_path, loggers=("wandb",)).close()
    if cut:
      (tmp_path / "log" / "wandb_id").write_text("")
  first, second, _ = (more["id"] for name, _, more in wandb.calls if name == "init")
  assert first == second != ""
  writers(tmp_path, loggers=("wandb",)).close()
  assert wandb.calls[-2][2]["id"] != ""


def test_a_disk_error_of_any_library_is_one_line_and_others_pass(tmp_path):
  for error in (
    OSError(errno.EROFS, "Read-only file system"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
    ValueError("UNAVAILABLE: writing [os_error_code='28'] [tensorstore_spec='{}']\nmore"),
  ):
    with (
      pytest.raises(UserError, match=r"x could not be written .*GiB are free there\. Do this\."),
      files.write_errors(tmp_path / "x", advice="Do this."),
    ):
      raise error
  for error in (ValueError("a fault of ours"), KeyboardInterrupt(), UserError("said already")):
    with pytest.raises(type(error)) as caught, files.write_errors(tmp_path / "x"):
      raise error
    assert caught.value is error


def test_a_full_disk_is_one_line_wherever_a_program_meets_it(capsys):
  for error, code in (
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1),
    (OSError(), 0),
  ):

    @cli.entry_point
    def main(error=error):
      raise error

    with pytest.raises(SystemExit if code else OSError):
      main()
  assert capsys.readouterr().err == (
    "error: /x/y: No space left on device; make room, or write elsewhere.\n"
  )


@pytest.mark.parametrize(
  "allocate, words",
  [
    (lambda: jnp.zeros((2**20, 2**30)), "RESOURCE_EXHAUSTED: Out of memory"),
    (lambda: np.zeros((2**20, 2**25)), "Unable to allocate"),
  ],
)
def test_too_little_memory_is_one_line(allocate, words, capsys):
  with pytest.raises(SystemExit) as end:
    cli.entry_point(allocate)()
  said = capsys.readouterr().err
  assert end.value.code == 1 and said.count("\n") == 1
  assert said.startswith("error: There is too little memory (") and words in said


def test_another_error_of_a_library_keeps_its_traceback():
  def fail():
    raise RuntimeError("INTERNAL: a fault")

  with pytest.raises(RuntimeError, match="a fault"):
    cli.entry_point(fail)()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_is_the_systems(number):
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with interrupt.Interrupt() as requests:
    assert not requests.pending and not requests.requested(1)
    signal.raise_signal(number)
    assert requests.pending and requests.requested(2) and requests.status == 128 + number
    # No code of ours runs for another one, which nothing can hold up.
    assert all(signal.getsignal(s) is signal.SIG_DFL for s in (signal.SIGTERM, signal.SIGINT))
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """The quickstart's data."""
  place = tmp_path_factory.mktemp("data")
  command = [sys.executable, str(ROOT / "scripts" / "make_tiny_data.py"), str(place / "tiny")]
  subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
  return place / "tiny"


def tiny_config(tiny, **changes):
  sys.path.insert(0, str(ROOT))
  try:
    from configs import tiny as config_file
  finally:
    sys.path.remove(str(ROOT))
  c = config_file.get_config()
  c.data.train_files = c.data.val_files = str(tiny / "val.parquet")
  c.model.config = str(tiny / "model")
  c.data.max_length, c.optim.batch_size, c.optim.total_steps, c.log.every = 48, 8, 50, 1
  c.log.debug_every = c.checkpoint.save_every = c.eval.eval_every = 50
  for key, value in changes.items():
    section, name = key.split("__")
    c[section][name] = value
  return from_config_dict(c)


@pytest.fixture
def quick_steps(monkeypatch):
  """Steps that count and do nothing, so that no test waits for a compiler."""

  def compiled(loop, state, batch, writers, requests):
    step = train.train_step.jit_train_step(loop.step_config, loop.forward, None)
    _, shapes = jax.eval_shape(step, state, batch)
    values = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return lambda state, batch, frozen: (state.replace(step=state.step + 1), values)

  monkeypatch.setattr(train._Loop, "_compile", compiled)
  monkeypatch.setattr(train._Loop, "_debug", lambda *_: None)


def test_a_run_whose_numbers_cannot_be_written_saves_and_ends(
  tiny, tmp_path, monkeypatch, capsys, quick_steps
):
  append = records.append

  def full_after_two(path, record):
    if record["step"] > 2:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    append(path, record)

  monkeypatch.setattr(records, "append", full_after_two)
  with pytest.raises(UserError) as caught:
    train.run(tiny_config(tiny), str(tmp_path / "run"))
  saved = directory.steps(tmp_path / "run" / "checkpoints")
  assert len(saved) == 1 and 3 <= saved[0] <= 5
  message = str(caught.value)
  assert "metrics.jsonl could not be written (No space left on device)" in message
  assert message.endswith(f"its newest checkpoint: step {saved[0]}.")
  out = capsys.readouterr().out
  assert "done:" not in out and "stopped by" not in out


def test_a_signal_while_validating_is_noticed_between_batches(
  tiny, tmp_path, monkeypatch, quick_steps
):
  batches = []

  def eval_batches(plan):
    for batch in plain(plan):
      batches.append(batch)
      if len(batches) == 1:
        signal.raise_signal(signal.SIGTERM)
      yield batch

  plain = train.plan_data.__globals__["DataPlan"].eval_batches
  monkeypatch.setattr(train.plan_data.__globals__["DataPlan"], "eval_batches", eval_batches)
  status = train.run(tiny_config(tiny, eval__eval_every=3), str(tmp_path / "run"))
  assert status == 128 + signal.SIGTERM and len(batches) <= 2
  assert directory.steps(tmp_path / "run" / "checkpoints") == [3]
  assert steps_of(tmp_path / "run", "eval/loss_total") == []


def test_a_signal_while_compiling_ends_the_run_before_a_step(tiny, tmp_path, monkeypatch, capsys):
  class Lowered:
    def lower(self, *_):
      return self

    def compile(self):
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(train.train_step, "jit_train_step", lambda *_: Lowered())
  assert train.run(tiny_config(tiny), str(tmp_path / "run")) == 128 + signal.SIGINT
  assert "stopped by SIGINT before the first step; nothing to save." in capsys.readouterr().out
  assert not (tmp_path / "run" / "checkpoints").exists()
