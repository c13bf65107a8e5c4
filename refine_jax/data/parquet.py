"""Prompts and responses out of parquet files, a few rows at a time."""

import glob
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from refine_jax.errors import UserError

_ROWS_AT_A_TIME = 1024


def expand(files: str) -> list[Path]:
  """A path, a glob, or several separated by commas -> existing files, globs in sorted order.

  Raises:
    UserError: a name that matches no file.
  """
  result = []
  for name in filter(None, (part.strip() for part in files.split(","))):
    matches = sorted(glob.glob(str(Path(name).expanduser())))
    if not matches:
      raise UserError(f"No file matches {name!r} (config.data.train_files or val_files).")
    result += map(Path, matches)
  return result


def batches(
  path: Path, prompt_key: str, response_key: str
) -> Iterator[tuple[int, list, list]]:
  """Reads one file by row group.

  Yields:
    the number of the first row, prompts, responses: Python values, not checked.

  Raises:
    UserError: the file cannot be read, or lacks a column.
  """
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      for key, which in ((prompt_key, "prompt_key"), (response_key, "response_key")):
        if key not in names:
          raise UserError(
            f"{path} has no column {key!r}; it has {', '.join(names)}. Set config.data.{which}."
          )
      row = 0
      columns = list(dict.fromkeys([prompt_key, response_key]))
      for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
        yield row, batch[prompt_key].to_pylist(), batch[response_key].to_pylist()
        row += batch.num_rows
  except (pyarrow.ArrowException, OSError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{path} cannot be read as parquet: {reason}") from error
