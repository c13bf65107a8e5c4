"""WORKDIR/checkpoints: which steps are there, and what the path must look like for Orbax."""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from refine_jax import files, processes
from refine_jax.errors import UserError
from refine_jax.quoting import reason

_STEP = re.compile(r"0|[1-9][0-9]*")
# Orbax looks for its files with a glob of the whole path, folders above included.
_GLOB = set("*?[")
# TensorStore opens no path with a backslash, and none that is not UTF-8.
_NEVER = {"\\"}
_DELETED = ".deleted"


def checkpoint_directory(workdir: str | Path) -> Path:
  return Path(workdir).absolute() / "checkpoints"


def steps(directory: Path) -> list[int]:
  """The complete checkpoints in a checkpoints directory, oldest first.

  A link to a directory counts; a file, and a name that is no plain number, does not.
  """
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if _STEP.fullmatch(p.name) and p.is_dir())


def check_writable_name(directory: Path) -> None:
  """Refuses a place whose checkpoints could not be read again.

  Raises:
    UserError: names the characters.
  """
  text = str(directory.absolute())
  found = sorted({c for c in text if c in _GLOB | _NEVER or "\ud800" <= c <= "\udfff"})
  if found:
    raise UserError(
      f"{text.encode(errors='replace').decode()} has {' '.join(map(repr, found))} in it, and"
      " checkpoints under such a name cannot be read again; choose a --workdir without, folders"
      " above it included."
    )


def resolve_resume_path(path: str) -> tuple[Path, int | None]:
  """A workdir, or WORKDIR/checkpoints/STEP -> (workdir, step or None for the newest).

  Raises:
    UserError: there is no checkpoint.
  """
  place = files.local_path(path, "config.checkpoint.resume_from_path").absolute()
  if _STEP.fullmatch(place.name) and place.parent.name == "checkpoints" and place.is_dir():
    return place.parent.parent, int(place.name)
  if steps(checkpoint_directory(place)):
    return place, None
  raise UserError(
    f"{place} holds no checkpoint; give a workdir or WORKDIR/checkpoints/STEP"
    " (config.checkpoint.resume_from_path)."
  )


def find_step(workdir: str | Path, step: int | None) -> int:
  """`step`, or the newest.

  Raises:
    UserError: it is not there; lists those that are.
  """
  directory = checkpoint_directory(workdir)
  there = steps(directory)
  if not there:
    raise UserError(f"{directory} holds no checkpoint.")
  if step is None:
    return there[-1]
  if step not in there:
    raise UserError(f"{directory} has no step {step}; it has {', '.join(map(str, there))}.")
  return step


def read_newest(
  directory: Path,
  step: int | None,
  read: Callable[[Path], Any],
  verify: Callable[[Path, Any], Any] = lambda _, found: found,
) -> tuple[Any, int, list[Path]]:
  """Reads the newest checkpoint that can be read, or that of `step`; all processes must call it.

  Args:
    read: of a path; each process for itself.
    verify: of a path and what `read` gave, when all processes have it.

  Returns:
    what `verify` gives; its step; the paths of newer ones that no process can read.

  Raises:
    UserError: none can be read, or only some processes can read one; or what `read` raises so.
  """
  damaged, why = [], "none"
  there = steps(directory)[::-1] if step is None else [step]
  chosen = processes.gather(" ".join(map(str, there)))[0]  # the first process's choice
  for candidate in map(int, chosen.split()):
    path = directory / str(candidate)
    found, error = _agreed(path, read, path)
    if error is None:
      found, error = _agreed(path, verify, path, found)
    if error is None:
      return found, candidate, damaged
    why = f"{path} cannot be read: {error}"
    logging.warning("checkpoint %s", why)
    damaged.append(path)
  raise UserError(
    f"No checkpoint in {directory} can be read ({why}). Nothing was changed; mend it, or"
    " choose another --workdir to start anew."
  )


def _agreed(path: Path, function: Callable, *arguments: Any) -> tuple[Any, str | None]:
  """What the function gives, or why no process could call it.

  Raises:
    UserError: what it raises so, or some processes could and others not.
  """
  result, why = None, ""
  with processes.together():
    try:
      result = function(*arguments)
    except UserError:
      raise
    except Exception as error:  # Orbax, TensorStore and JSON raise many kinds
      why = reason(error) or "an error"
  reasons = processes.gather(why)
  failed = [i for i, text in enumerate(reasons) if text]
  if 0 < len(failed) < len(reasons):
    raise UserError(
      f"{path} cannot be read by process {failed[0]} of {len(reasons)} ({reasons[failed[0]]}), and"
      " can by others. Nothing was changed; see that every host reaches the same files."
    )
  return result, why or None


def position(path: Path, record: dict) -> dict:
  """The data iterator's state in a checkpoint: one index, whatever the number of processes."""
  if "position" in record:
    return record["position"]
  # Of earlier releases: in a file for each process, all the same.
  file = min((path / "data").glob("process_*.json"))
  return json.loads(file.read_text(encoding="utf-8"))


def refuse_taken(path: Path) -> None:
  """Raises UserError for a file or a broken link at a step's place, which Orbax would replace."""
  if path.exists() or path.is_symlink():
    raise UserError(f"{path} is in the way of this step's checkpoint; move it elsewhere.")


def set_aside(path: Path) -> None:
  """Renames a damaged checkpoint to STEP.damaged, to make room for its step."""
  others = len(list(path.parent.glob(f"{path.name}.damaged*")))
  path.rename(path.with_name(f"{path.name}.damaged" + (f"-{others}" if others else "")))


def delete_all_but(directory: Path, keep: int) -> None:
  """Deletes the oldest, so that `keep` are left; of a link the link only.

  Under another name first: a process killed meanwhile leaves nothing that looks complete.
  """
  for step in steps(directory)[:-keep]:
    path = directory / str(step)
    if path.is_symlink():
      path.unlink()
    else:
      path.rename(directory / f"{step}{_DELETED}")
  for path in directory.glob(f"*{_DELETED}"):
    shutil.rmtree(path, ignore_errors=True)


class Disk:
  """What the file system says of a checkpoints directory, told once."""

  def __init__(self, directory: Path) -> None:
    self._directory, self._failed = directory, False

  @contextlib.contextmanager
  def errors(self, *, again: bool = False) -> Iterator[None]:
    """Turns errors of the file system into a UserError (files.write_errors).

    Args:
      again: whether Orbax raises in this block what it has raised before; that is left out then.
    """
    failed = self._failed
    try:
      with files.write_errors(
        self._directory,
        what=f"The checkpoint in {self._directory}",
        advice="Earlier checkpoints are whole: make room and start again.",
      ):
        yield
    except UserError:
      self._failed = True
      if not (again and failed):
        raise
