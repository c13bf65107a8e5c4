"""Problems out of files, each with the name of its place."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from refine_jax.data import parquet
from refine_jax.errors import UserError
from refine_jax.evaluation import scoring
from refine_jax.quoting import some


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of one or several files.

  Attributes:
    rows: one dict for each row.
    places: the file and the number in it, from 0, of each.
    columns: the names that all the files have.
  """

  rows: list[dict]
  places: list[str]
  columns: frozenset[str]


def read(files: str, limit: int, option: str, keys: Sequence[str] = ()) -> Rows:
  """Reads the first rows of files that `parquet.expand` names.

  Args:
    limit: how many; 0: all.
    option: what the files were given by, for messages.
    keys: columns that every file must have; they and what scorers read are read, or without keys
      all there are.

  Raises:
    UserError: a file cannot be read or lacks a column, there is no row, limit is negative.
  """
  if limit < 0:
    raise UserError(f"{limit} rows of {option} cannot be; give 0 for all, or how many.")
  rows, places, columns = [], [], None
  for path in parquet.expand(files, option):
    names = parquet.columns(path)
    _require(path, option, names, keys)
    columns = set(names) if columns is None else columns & set(names)
    if limit and len(rows) >= limit:
      continue  # its columns count all the same
    wanted = [n for n in names if not keys or n in (*keys, *scoring.COLUMNS)]
    for first, batch in parquet.rows(path, wanted):
      rows += batch
      places += [f"{path}, row {first + i} (from 0)" for i in range(len(batch))]
      if limit and len(rows) >= limit:
        break
  if limit:
    rows, places = rows[:limit], places[:limit]
  if not rows:
    raise UserError(f"{files} ({option}) has no rows.")
  return Rows(rows, places, frozenset(columns or ()))


def _require(path: Path, option: str, names: Sequence[str], keys: Sequence[str]):
  for key in keys:
    if key not in names:
      raise UserError(
        f"{path} ({option}) has no column {key!r}; it has {some(names, 20) or 'none'}."
      )
