"""Where a run's numbers go: metrics.jsonl, TensorBoard's files, wandb.

Each writes in the caller's thread and keeps nothing back: what fails is raised by the call that
it belongs to, and there is no queue that could fill up.
"""

import contextlib
import math
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from refine_jax import files, records
from refine_jax.config import LogConfig
from refine_jax.errors import UserError
from refine_jax.quoting import reason


class Sink(Protocol):
  """One place for numbers."""

  place: Path

  def write(self, step: int, metrics: dict) -> None: ...

  def close(self) -> None: ...


class MetricsFile:
  """WORKDIR/metrics.jsonl, with each step once.

  Args:
    first: the step that the run goes on after; `moved` tells how many records of later steps there
      were, which are in WORKDIR/log/metrics_replaced.jsonl now.
  """

  def __init__(self, workdir: Path, *, first: int) -> None:
    self.place = workdir / records.NAME
    self.replaced = workdir / "log" / "metrics_replaced.jsonl"
    with files.write_errors(self.place):
      self.moved = records.begin(self.place, first, self.replaced)

  def write(self, step: int, metrics: dict) -> None:
    # JSON has no NaN; null is what readers take it for.
    finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    records.append(self.place, {"step": step} | finite)

  def close(self) -> None:
    pass


class TensorBoard:
  """A file of events in WORKDIR/tensorboard, one for each start of the run.

  tensorboardX's own writer puts events into a queue that another thread empties: when that dies of
  a full disk, the caller waits for ever. Its records and events are used, its threads are not.

  Args:
    first: the step that the run goes on after. TensorBoard hides points of later steps that earlier
      files have.
  """

  def __init__(self, workdir: Path, *, first: int) -> None:
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    self._pb, self._summary, self._crc = event_pb2, summary, record_writer.masked_crc32c
    self.place = workdir / "tensorboard"
    self._first = first
    # TensorBoard reads the files of a directory in the order of their names.
    self._path = self.place / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
    with files.write_errors(self.place):
      self._append(b"")

  def write(self, step: int, metrics: dict) -> None:
    events = (
      self._event(step=step, summary=self._summary.scalar(name, value))
      for name, value in metrics.items()
    )
    self._append(b"".join(events))

  def close(self) -> None:
    pass

  def _append(self, events: bytes):
    if not self._path.exists():  # also where someone removed it
      self.place.mkdir(exist_ok=True)
      start = self._pb.SessionLog(status=self._pb.SessionLog.START)
      events = (
        self._event(file_version="brain.Event:2")
        + self._event(step=self._first + 1, session_log=start)
        + events
      )
    with open(self._path, "ab") as file:
      file.write(events)

  def _event(self, **fields) -> bytes:
    """An event as a record of TensorFlow's format: length and data, a checksum after each."""
    data = self._pb.Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", self._crc(x)) for x in (length, data))
    return length + next(sums) + data + next(sums)


class Wandb:
  """A run of wandb: the same one whenever the same workdir goes on."""

  def __init__(self, workdir: Path, config: LogConfig, run_config: dict) -> None:
    check_wandb()
    import wandb  # pyright: ignore[reportMissingImports]  an extra that tests need not

    self.place = workdir / "wandb"
    identifier = _run_id(workdir)
    with _wandb_errors():
      self._run = wandb.init(
        project=config.project_name,
        name=config.experiment_name or workdir.name,
        id=identifier,
        resume="allow",
        config=run_config,
        dir=str(workdir),
      )

  def write(self, step: int, metrics: dict) -> None:
    with _wandb_errors():
      self._run.log(metrics, step=step)

  def close(self) -> None:
    with _wandb_errors():
      self._run.finish()


def check_wandb() -> None:
  """Raises UserError where wandb is not installed."""
  try:
    import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]  likewise
  except ImportError:
    raise UserError(
      "config.log.logger names wandb, which is not installed: pip install -e '.[wandb]'."
    ) from None


@contextlib.contextmanager
def _wandb_errors() -> Iterator[None]:
  try:
    yield
  except Exception as error:  # its own kinds, and those of what it uses
    raise UserError(
      f"wandb failed ({reason(error)}); start again when it works, or without it"
      " (config.log.logger)."
    ) from error


def _run_id(workdir: Path) -> str:
  path = workdir / "log" / "wandb_id"
  found = path.read_text(encoding="utf-8").strip() if path.exists() else ""
  if not found:  # or cut short by a full disk
    found = f"{time.time_ns():x}"
    with files.new_file(path, replace=True) as temporary:
      temporary.write_text(found, encoding="utf-8")
  return found
