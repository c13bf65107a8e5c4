"""A lock file that keeps other processes out of a directory."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from refine_jax import files
from refine_jax.errors import UserError


class InUseError(UserError):
  """Another process holds the lock."""


class Lock:
  """A lock file that this process holds; a process that dies lets go of it.

  Args:
    what: what it stands for, for messages.

  Raises:
    InUseError: names the process.
    UserError: it cannot be written.
  """

  def __init__(self, path: Path, what: str) -> None:
    self._path, self._what = path, what
    self._descriptor = self._take()

  def keep(self) -> bool:
    """Takes the lock again if its file, or a directory above it, was removed, moved or replaced.

    Returns:
      whether the file was still there.

    Raises:
      InUseError: another process holds it by now.
      OSError, UserError: it cannot be looked at, or not be written.
    """
    if self._is_there(self._descriptor):
      return True
    with files.write_errors(self._path.parent):
      self._path.parent.mkdir(parents=True, exist_ok=True)
    before, self._descriptor = self._descriptor, self._take()
    os.close(before)
    return False

  def release(self) -> None:
    """Lets go of it and removes the file, unless that is another's by now.

    Raises nothing: it would hide the error that a run ends with. A file that stays holds nobody up.
    """
    with contextlib.suppress(OSError):  # a disk that is read-only by now
      if self._is_there(self._descriptor):
        self._path.unlink()
    os.close(self._descriptor)

  def _take(self) -> int:
    with files.write_errors(self._path):
      descriptor = self._locked()
      os.ftruncate(descriptor, 0)
      os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor

  def _locked(self) -> int:
    while True:
      descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise InUseError(
          f"{self._what} is in use by {holder}; wait for it, or choose another."
        ) from None
      except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
          raise
        # A file system without locks: nothing tells two processes apart there.
        return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      # The one before may have removed the file between our opening and our locking it.
      if self._is_there(descriptor):
        return descriptor
      os.close(descriptor)

  def _is_there(self, descriptor: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
      return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
    except (FileNotFoundError, NotADirectoryError):
      return False


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[Lock]:
  """Holds the lock file `path` during the block; arguments and errors as of `Lock`."""
  held = Lock(path, what)
  try:
    yield held
  finally:
    held.release()
