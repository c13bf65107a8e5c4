"""metrics.jsonl: a JSON object a line, each with its step. Everything that reads or writes it."""

import json
from collections.abc import Iterator
from pathlib import Path

from refine_jax import files

NAME = "metrics.jsonl"


def read(path: Path) -> list[dict]:
  """The whole records, in the order of the file; none where there is no file.

  A line that a killed process left half written, or that is no record, is passed over.
  """
  return [record for _, record in _lines(path) if record is not None]


def append(path: Path, record: dict) -> None:
  """Adds a record, which is with the operating system when this returns.

  Raises:
    OSError: it could not be written.
  """
  # Opened anew: after someone has moved or edited the file, records go where its name leads.
  with open(path, "ab") as file:
    file.write(json.dumps(record).encode() + b"\n")


def begin(path: Path, step: int, replaced: Path) -> int:
  """Makes the file ready for a run that goes on after `step`.

  Records of later steps are moved to the end of `replaced`: their steps will be taken again. Half
  lines are dropped. A file that has neither stays as it is.

  Returns:
    how many records were moved.

  Raises:
    OSError, UserError: it could not be written.
  """
  open(path, "ab").close()  # whether it can be written, before anything is
  later = [line for line, record in _lines(path) if record and record["step"] > step]
  if later:
    replaced.parent.mkdir(exist_ok=True)
    with open(replaced, "ab") as file:
      file.writelines(later)
  if later or not _is_whole(path):
    with files.new_file(path, replace=True) as temporary, open(temporary, "wb") as file:
      file.writelines(line for line, record in _lines(path) if record and record["step"] <= step)
  return len(later)


def _is_whole(path: Path) -> bool:
  return all(record is not None for _, record in _lines(path))


def _lines(path: Path) -> Iterator[tuple[bytes, dict | None]]:
  """Each line with its record, None for what is none."""
  if not path.is_file():  # nor is a device one
    return
  with open(path, "rb") as file:
    for line in file:
      yield line, _record(line)


def _record(line: bytes) -> dict | None:
  try:
    record = json.loads(line) if line.endswith(b"\n") else None
  except (ValueError, RecursionError):
    return None
  good = isinstance(record, dict) and type(record.get("step")) is int
  return record if good else None
