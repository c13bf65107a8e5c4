"""Prompts and responses out of parquet files, a few rows at a time."""

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from refine_jax.errors import UserError
from refine_jax.files import local_path

_ROWS_AT_A_TIME = 1024
_BUFFER_BYTES = 1 << 20


def expand(files: str, option: str) -> list[Path]:
  """A path, a glob, or several separated by commas -> existing files, globs in sorted order.

  Args:
    option: what they were given by, for the message.

  Raises:
    UserError: a name that matches no file.
  """
  result = []
  for name in filter(None, (part.strip() for part in files.split(","))):
    path = local_path(name, option)
    if path.is_dir():
      raise UserError(f"{path} is a directory; name its files, as in {path}/*.parquet.")
    if path.exists():  # even where its name has the characters of a glob
      result.append(path)
      continue
    matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not matches:
      raise UserError(f"No file matches {name!r}; correct {option}.")
    result += matches
  if not result:
    raise UserError(f"No file is named in {files!r}; name a parquet file.")
  return result


def count_rows(paths: list[Path], prompt_key: str, response_key: str) -> int:
  """Rows of all files, from their footers: what is wrong with the last is found at once.

  Raises:
    UserError: a file cannot be read, or lacks a column.
  """
  rows = 0
  for path in paths:
    with _open(path) as file:
      names = file.schema_arrow.names
      for key, option in ((prompt_key, "prompt_key"), (response_key, "response_key")):
        if key not in names:
          raise UserError(
            f"{path} has no column {key!r}; it has {', '.join(names)}. Set config.data.{option}."
          )
      rows += file.metadata.num_rows
  return rows


def batches(path: Path, prompt_key: str, response_key: str) -> Iterator[tuple[int, list, list]]:
  """Reads one file piece by piece: neither it nor a row group of it has to fit into memory.

  Yields:
    the number of the first row (from 0), prompts, responses: Python values, not checked.

  Raises:
    UserError: the file cannot be read.
  """
  columns = list(dict.fromkeys([prompt_key, response_key]))
  with _open(path) as file:
    first = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
      yield first, _values(batch[prompt_key]), _values(batch[response_key])
      first += batch.num_rows


@contextlib.contextmanager
def _open(path):
  try:
    # Buffering ahead, pyarrow's default, would keep every row group of the file in memory, and
    # without a buffer size a row group is read as a whole.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
      yield file
  except (pyarrow.ArrowException, OSError) as error:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(f"{path} cannot be read as parquet: {reason}") from error


def _values(column: pyarrow.Array) -> list:
  try:
    return column.to_pylist()
  except UnicodeDecodeError:
    return [_value(cell) for cell in column]


def _value(cell):
  try:
    return cell.as_py()
  except UnicodeDecodeError:
    return b""  # bytes are neither a string nor messages, and so the row is dropped
