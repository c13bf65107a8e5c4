"""Paths that users give, and writing that leaves a complete file or directory or none."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from refine_jax.errors import UserError
from refine_jax.quoting import reason

# Also what pathlib makes of "gs://bucket": "gs:/bucket".
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_NAME_SHOWN = 60
# What a disk that takes nothing more says: no fault of ours, wherever it shows.
DISK_ERRORS = frozenset(
  (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
)
# How TensorStore, Rust and C++ libraries write an errno.
_OS_ERROR = re.compile(
  "|".join((r"os_error_code|\bos error \d", *(re.escape(os.strerror(e)) for e in DISK_ERRORS)))
)


def local_path(value: str | os.PathLike, option: str) -> Path:
  """A path that a user gave, with ~ and ~user expanded: the one rule for every option.

  Args:
    option: what it was given by, for the message.

  Raises:
    UserError: empty, of a scheme such as gs://, of no user's home, or no name that a file can have.
  """
  text = os.fspath(value)
  shown = text if len(text) <= _NAME_SHOWN else f"{text[:_NAME_SHOWN]}... ({len(text)} characters)"
  if not text:
    raise UserError(f"{option} is empty; name a path.")
  refuse_scheme(text, option)
  try:
    path = Path(text).expanduser()
  except RuntimeError:
    user = text.partition("/")[0]
    raise UserError(f"{option}={shown}: there is no home directory of {user}.") from None
  try:
    os.lstat(path)
  except ValueError as error:  # a null byte, a lone surrogate
    raise UserError(f"{option}={shown!r} cannot be a path: {error}.") from None
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      raise UserError(f"{option}={shown} is too long for a path.") from None
    # Whether it has to be there, and may be read, is its reader's business.
  return path


def refuse_scheme(name: str, option: str) -> None:
  """Raises UserError for gs://, s3://, hf:// and their like: all files here are local ones."""
  scheme = _SCHEME.match(name)
  if scheme:
    raise UserError(
      f"{option}={name[:_NAME_SHOWN]}: {scheme[1]}:// is not supported; give a path of this"
      " machine: mount the bucket (gcsfuse, for one), or copy the files."
    )


def refuse_used(output: Path, option: str = "") -> None:
  """Raises UserError where something is at the place, but for an empty directory."""
  if output.is_symlink() or output.exists():
    if not output.is_dir() or any(output.iterdir()):
      named = f"{option}={output}" if option else f"{output}"
      raise UserError(f"{named} exists and is not empty; choose another output, or remove it.")


@contextlib.contextmanager
def write_errors(path: Path, *, what: str = "", advice: str = "") -> Iterator[None]:
  """Turns an error of the file system into a UserError: the one rule for everything written.

  A full disk, a read-only one, a directory that was removed: one line with the place, the reason
  and the room that is left. Libraries that keep the error's number in their own kind of exception
  (safetensors, TensorStore, XLA) count; any other exception passes.

  Args:
    path: what is written, or a directory around it.
    what: a name for it; default: the path.
    advice: a sentence with what to do.

  Raises:
    UserError: the file system refused.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if not isinstance(error, OSError) and not _OS_ERROR.search(str(error)):
      raise
    message = f"{what or path} could not be written ({reason(error)}); {free_space(path)}."
    raise UserError(f"{message} {advice}") from error


def free_space(path: Path) -> str:
  """How much room is left where `path` is or would be: "1.5 GiB are free there"."""
  path = path.absolute()
  parent = next(p for p in (path, *path.parents) if p.is_dir())
  return f"{shutil.disk_usage(parent).free / 2**30:.1f} GiB are free there"


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
  """A free name beside `path` to write to, which the caller renames when all is written.

  What is left under that name at the end is removed, and so is what killed processes left of
  earlier attempts at `path`.
  """
  remove_leftovers(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
  finally:
    _remove(temporary)


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[Path]:
  """A name to write to in the block, which becomes `path` at its end: complete or not at all.

  Args:
    replace: whether `path` may be there already.

  Raises:
    UserError: `path` is there already, or cannot be written.
  """
  with write_errors(path), unfinished(path) as temporary:
    if not replace:
      refuse_used(path)
    yield temporary
    sync(temporary)
    if not replace:
      refuse_used(path)  # since then another process may have written it
    temporary.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
  """An empty directory to fill in the block, which becomes `path` at its end, or not at all.

  Raises:
    UserError: `path` is there already and not empty, or cannot be written.
  """
  with write_errors(path), unfinished(path) as temporary:
    refuse_used(path)
    temporary.mkdir()
    yield temporary
    for folder, _, names in os.walk(temporary, topdown=False):
      for name in names:
        sync(Path(folder) / name)
      sync(Path(folder))
    refuse_used(path)
    temporary.rename(path)  # over an empty directory, too
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
  """Writes `value` to `path`, over what is there, complete or not at all.

  Raises:
    UserError: it cannot be written.
  """
  with new_file(path, replace=True) as temporary:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
  """Brings a file, or the names in a directory, to the disk.

  Without it a power cut may leave the final name on a half-written file.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def remove_leftovers(path: Path) -> None:
  """Removes .NAME.PID.new beside `path` where no process PID runs here."""
  pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.new", re.ASCII)
  if path.parent.is_dir():
    for other in path.parent.iterdir():
      found = pattern.fullmatch(other.name)
      if found and not _runs(int(found[1])):
        _remove(other)


def _runs(pid: int) -> bool:
  """Whether another process has this number."""
  if pid == os.getpid():
    return False
  try:
    os.kill(pid, 0)
  except PermissionError:  # another user's
    return True
  except (ProcessLookupError, OverflowError):
    return False
  return True


def _remove(path: Path):
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)
