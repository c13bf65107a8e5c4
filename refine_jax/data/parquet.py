"""Prompts and responses out of files, a few rows at a time: Parquet, or a JSON object a line."""

import codecs
import contextlib
import glob
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from refine_jax.errors import UserError
from refine_jax.files import local_path
from refine_jax.quoting import cut, reason

_ROWS_AT_A_TIME = 1024
_BUFFER_BYTES = 1 << 20
_JSON_LINES = (".jsonl", ".ndjson", ".json")
# What stands for a cell that cannot be read: neither a string nor messages, so its row is dropped.
_UNREADABLE = b""


def expand(files: str, option: str) -> list[Path]:
  """A path, a glob, or several separated by commas -> existing files, globs in sorted order.

  Args:
    option: what they were given by, for the message.

  Raises:
    UserError: a name that matches no file, or cannot be one.
  """
  result = []
  for name in filter(None, (part.strip() for part in files.split(","))):
    found = _matches(name, option)
    if not found:
      raise UserError(f"No file matches {cut(repr(name))}; correct {option}.")
    result += found
  if not result:
    raise UserError(f"No file is named in {cut(repr(files))}; name a parquet file.")
  return result


def _matches(name: str, option: str) -> list[Path]:
  path = local_path(name, option)
  if path.is_dir():
    raise UserError(f"{path} is a directory; name its files, as in {path}/*.parquet.")
  if path.exists():  # even where its name has the characters of a glob
    return [path]
  return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())


def is_json_lines(path: Path) -> bool:
  """Whether a file holds a JSON object a line, by its name; any other is Parquet."""
  return path.suffix.lower() in _JSON_LINES


def count_rows(paths: list[Path], prompt_key: str, response_key: str) -> int:
  """Rows of all files: what is wrong with the last is found at once.

  Raises:
    UserError: a file cannot be read, lacks a column, or has it twice.
  """
  rows = 0
  for path in paths:
    if is_json_lines(path):
      names, count = _json_columns(path)
    else:
      with _open(path) as file:
        names, count = file.schema_arrow.names, file.metadata.num_rows
    for key, option in ((prompt_key, "prompt_key"), (response_key, "response_key")):
      if key not in names:
        raise UserError(
          f"{path} has no column {key!r}; it has {cut(', '.join(names)) or 'none'}."
          f" Set config.data.{option}."
        )
      if names.count(key) > 1:
        raise UserError(
          f"{path} has {names.count(key)} columns {key!r}; rename them so that one is left."
        )
    rows += count
  return rows


def _json_columns(path: Path) -> tuple[list[str], int]:
  """The names in the first lines that are objects, and the number of lines."""
  names, count = {}, 0
  for _, row in _json_rows(path):
    count += 1
    if count <= _ROWS_AT_A_TIME and isinstance(row, dict):
      names |= dict.fromkeys(row)
  return list(names), count


def batches(path: Path, prompt_key: str, response_key: str) -> Iterator[tuple[int, list, list]]:
  """Reads one file piece by piece: neither it nor a row group of it has to fit into memory.

  Yields:
    the number of the first row (from 0), prompts, responses: Python values, not checked.

  Raises:
    UserError: the file cannot be read.
  """
  path = Path(path)
  if is_json_lines(path):
    yield from _json_batches(path, prompt_key, response_key)
    return
  columns = list(dict.fromkeys([prompt_key, response_key]))
  with _open(path) as file:
    first = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
      yield first, _values(batch[prompt_key]), _values(batch[response_key])
      first += batch.num_rows


def _json_batches(path, prompt_key, response_key):
  for first, piece in rows(path, [prompt_key, response_key]):
    yield first, [row[prompt_key] for row in piece], [row[response_key] for row in piece]


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
  """Number and value of every line that is not empty; a line that is no JSON gives _UNREADABLE."""
  _refuse_pipe(path)
  try:
    with open(path, "rb") as file:
      lines = (line for line in file if line.strip())
      for number, line in enumerate(lines):
        utf_16 = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in line
        if not number and utf_16:
          raise UserError(f"{path} is not UTF-8 but UTF-16; save it as UTF-8.")
        if not number and line.lstrip().startswith(b"["):
          raise UserError(
            f"{path} is a JSON array; write an object a line (jq -c '.[]' {path.name}), or parquet."
          )
        try:
          yield number, json.loads(line)
        except (ValueError, RecursionError):
          yield number, _UNREADABLE
  except OSError as error:
    raise UserError(f"{path} cannot be read: {reason(error)}") from error


def columns(path: Path) -> list[str]:
  """The names of a file's columns; of JSON lines, those in its first lines.

  Raises:
    UserError: the file cannot be read, or has two columns of one name.
  """
  if is_json_lines(path):
    return _json_columns(path)[0]
  with _open(path) as file:
    names = file.schema_arrow.names
  twice = next((name for name in names if names.count(name) > 1), None)
  if twice is not None:
    raise UserError(
      f"{path} has {names.count(twice)} columns {twice!r}; rename them so that one is left."
    )
  return names


def rows(path: Path, names: list[str]) -> Iterator[tuple[int, list[dict]]]:
  """Reads some columns of one file piece by piece.

  Yields:
    the number of the first row (from 0), the rows: Python values, not checked.

  Raises:
    UserError: the file cannot be read.
  """
  if is_json_lines(path):
    lines = _json_rows(path)
    while piece := list(itertools.islice(lines, _ROWS_AT_A_TIME)):
      yield piece[0][0], [_json_cells(row, names) for _, row in piece]
    return
  first = 0
  with _open(path) as file:
    for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=names):
      cells = [_values(batch[name]) for name in names]
      yield first, [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]
      first += batch.num_rows


def _json_cells(row: object, names: list[str]) -> dict:
  return {name: row.get(name) if isinstance(row, dict) else _UNREADABLE for name in names}


def _refuse_pipe(path):
  """Raises UserError for what is read once only, and may have no end."""
  if path.exists() and not path.is_file() and not path.is_dir():
    raise UserError(f"{path} is a pipe or a device; copy what it gives into a file.")


@contextlib.contextmanager
def _open(path):
  _refuse_pipe(path)
  try:
    # Buffering ahead, pyarrow's default, would keep every row group of the file in memory, and
    # without a buffer size a row group is read as a whole.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
      yield file
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read as parquet: {reason(error)}") from error


def _values(column: pyarrow.Array) -> list:
  try:
    return column.to_pylist(maps_as_pydicts="strict")
  except Exception:  # text that is no UTF-8, times out of range, a map with a key twice
    return [_value(cell) for cell in column]


def _value(cell):
  try:
    return cell.as_py(maps_as_pydicts="strict")
  except Exception:
    return _UNREADABLE
