"""What command-line programs do with errors."""

import functools
import io
import os
import signal
import sys
from collections.abc import Callable

from refine_jax import files
from refine_jax.errors import UserError
from refine_jax.quoting import reason


def entry_point(main: Callable[[], int | None]) -> Callable[[], None]:
  """Runs `main`; a UserError becomes one line on stderr and exit status 1.

  So does a full or read-only disk, and too little memory. An interrupt and a closed pipe end it
  with the status that a shell gives them.
  """

  @functools.wraps(main)
  def run() -> None:
    # What is printed quotes files: a lone surrogate, or a letter that the terminal's encoding
    # lacks, ends no program.
    if isinstance(sys.stdout, io.TextIOWrapper):
      sys.stdout.reconfigure(errors="backslashreplace")
    try:
      status = main()
      sys.stdout.flush()
      sys.exit(status)
    except KeyboardInterrupt:
      print(file=sys.stderr)
      sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
      _drop_output()
      sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
      text = one_line(error)
      if text is None:
        raise
      _fail(text)

  return run


def one_line(error: BaseException) -> str | None:
  """What a user is told of an error that can be mended; None for others, which are faults."""
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, OSError) and error.errno in files.DISK_ERRORS:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}; make room, or write elsewhere."
  # JAX's errors are RuntimeErrors.
  full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
  if full or isinstance(error, MemoryError):
    return (
      f"There is too little memory ({reason(error)}); lower the batch size or the length, or take"
      " a larger device. docs/troubleshooting.md says what else saves memory."
    )
  return None


def whole_number(option: str, least: int) -> Callable[[str], int]:
  """A type for argparse: whole numbers of at least so much.

  Raises:
    UserError: from the type, names the option, what was given and what it may be.
  """

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = None
    if value is None or value < least:
      raise UserError(f"{option}={text!r} must be a whole number of at least {least}.")
    return value

  return parse


def _fail(error):
  print(f"error: {error}", file=sys.stderr)
  try:
    sys.stdout.flush()
  except OSError:  # it may be what failed
    _drop_output()
  sys.exit(1)


def _drop_output():
  # Or Python would try to write what is left in the buffer, and fail again.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
