"""Tokenised examples as flat arrays on disk.

An entry is a directory of four arrays and stats.json. It is written next to its final place and
renamed, so that a reader sees all of it or nothing; checksums tell a damaged one.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

import filelock
import numpy as np

from refine_jax import files
from refine_jax.errors import UserError
from refine_jax.quoting import reason

# Name, type, columns (0: one-dimensional).
_ARRAYS = (
  ("tokens", np.int32, 0),
  ("offsets", np.int64, 0),
  ("prompt_lengths", np.int32, 0),
  ("source_rows", np.int64, 2),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Prompts with their responses.

  Attributes:
    tokens: int32, all examples one after the other.
    offsets: int64 [count + 1], where each begins.
    prompt_lengths: int32 [count]; the rest of an example is its response.
    source_rows: int64 [count, 2]: number of the file, row in it.
    dropped: reason -> rows.
    truncated: examples that were cut to max_length.
    noted: what was left out of examples that were kept -> examples.
    places: reason -> the first rows dropped for it, each as in source_rows.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  prompt_lengths: np.ndarray
  source_rows: np.ndarray
  dropped: dict[str, int]
  truncated: int = 0
  noted: dict[str, int] = dataclasses.field(default_factory=dict)
  places: dict[str, list] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.prompt_lengths)

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self.offsets)

  @property
  def response_lengths(self) -> np.ndarray:
    return self.lengths - self.prompt_lengths

  def example(self, index: int) -> np.ndarray:
    """int32 ids, prompt first."""
    return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class Writer:
  """Appends examples to the files of a new entry; memory does not grow with their number."""

  def __init__(self, directory: Path) -> None:
    self._directory = directory
    self._files = contextlib.ExitStack()
    self._arrays = {
      name: self._files.enter_context(open(directory / f"{name}.bin", "wb"))
      for name, _, _ in _ARRAYS
    }
    self._checksums = dict.fromkeys(self._arrays, 0)
    self._total = 0
    self.count = 0
    self._append("offsets", np.zeros(1, np.int64))

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self._files.close()

  def append(self, ids: list[list[int]], prompt_lengths: list[int], source_rows: list) -> None:
    """A few examples; source_rows has (number of the file, row) for each."""
    if not ids:
      return
    ends = self._total + np.cumsum([len(x) for x in ids], dtype=np.int64)
    self._total, self.count = int(ends[-1]), self.count + len(ids)
    self._append("tokens", np.concatenate([np.asarray(x, np.int32) for x in ids]))
    self._append("offsets", ends)
    self._append("prompt_lengths", np.asarray(prompt_lengths, np.int32))
    self._append("source_rows", np.asarray(source_rows, np.int64))

  def _append(self, name, array):
    self._arrays[name].write(array)
    self._checksums[name] = zlib.crc32(array, self._checksums[name])

  def finish(
    self,
    *,
    dropped: dict[str, int],
    truncated: int,
    noted: dict[str, int] | None = None,
    places: dict[str, list] | None = None,
  ) -> None:
    """The last call: everything is on the disk when it returns."""
    for file in self._arrays.values():
      file.flush()
      os.fsync(file.fileno())
    stats = {
      "examples": self.count,
      "tokens": self._total,
      "dropped": dropped,
      "truncated": truncated,
      "noted": noted or {},
      "places": places or {},
      "checksums": self._checksums,
    }
    with open(self._directory / "stats.json", "w", encoding="utf-8") as file:
      json.dump(stats, file, indent=2)
      file.flush()
      os.fsync(file.fileno())


def read(place: Path) -> Examples | None:
  """The entry as memory maps, or None where there is none or it is damaged."""
  try:
    stats = json.loads((place / "stats.json").read_text(encoding="utf-8"))
    count = stats["examples"]
    sizes = {"tokens": stats["tokens"], "offsets": count + 1}
    arrays = {}
    for name, dtype, columns in _ARRAYS:
      shape = (sizes.get(name, count), columns) if columns else (sizes.get(name, count),)
      arrays[name] = _memory_map(place / f"{name}.bin", dtype, shape, stats["checksums"][name])
    counted = {name: dict(stats[name]) for name in ("dropped", "noted", "places")}
    return Examples(truncated=stats["truncated"], **counted, **arrays)
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _memory_map(path, dtype, shape, checksum):
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  if path.stat().st_size != size:
    raise ValueError(f"{path} has the wrong size")
  array = np.memmap(path, dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype)
  if zlib.crc32(array.data) != checksum:
    raise ValueError(f"{path} has the wrong checksum")
  return array


def read_or_build(place: Path, build: Callable[[Writer], None]) -> tuple[Examples, bool]:
  """The entry at `place`, built first where there is none or it is damaged.

  Of several processes one builds and the others wait for it.

  Args:
    build: fills a Writer, up to its `finish`.

  Returns:
    examples; whether they were there already.

  Raises:
    UserError: the place cannot be written.
  """
  examples = read(place)
  if examples is not None:
    return examples, True
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place) as alone:
      if alone:
        for left in place.parent.glob(f"{place.name}.*.new"):  # of processes that were killed
          shutil.rmtree(left, ignore_errors=True)
      examples = read(place)  # made by another process while this one waited
      if examples is not None:
        return examples, True
      _build(place, build)
      examples = read(place)
      if examples is None:
        raise OSError("what was written differs when read back")
  except OSError as error:
    raise UserError(
      f"The token cache {place} cannot be written: {reason(error)};"
      f" {files.free_space(place)}."
      " Set config.data.cache_dir or REFINE_JAX_CACHE to a place with room."
    ) from error
  return examples, False


@contextlib.contextmanager
def _locked(place):
  """Keeps other processes from building `place`; whether it does."""
  lock = filelock.FileLock(f"{place}.lock")
  try:
    lock.acquire()
  except NotImplementedError:
    # A file system without locks: two processes may do the same work, and one of the equal
    # results stays.
    yield False
    return
  try:
    yield True
  finally:
    lock.release()


def _build(place: Path, build):
  unique = f"{place.name}.{uuid.uuid4().hex[:12]}"
  temporary, aside = place.with_name(f"{unique}.new"), place.with_name(f"{unique}.old")
  temporary.mkdir()
  try:
    with Writer(temporary) as writer:
      build(writer)
    if read(place) is not None:
      return  # by a process that the lock did not reach; it may be reading it
    if place.exists():
      print(f"The token cache {place} is damaged; it is made again.")
      place.rename(aside)
    temporary.rename(place)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
