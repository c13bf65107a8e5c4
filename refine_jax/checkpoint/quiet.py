"""What Orbax's threads print of a failed save, kept off the console."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def quiet_threads() -> None:
  """Keeps tracebacks of Orbax's threads off the console: the caller raises their errors itself.

  With REFINE_JAX_VERBOSE they stay.
  """
  if os.environ.get("REFINE_JAX_VERBOSE"):
    return
  # A logger takes the same filter once.
  for name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(name).addFilter(_is_news)
  if not isinstance(sys.unraisablehook, _NewsHook):
    sys.unraisablehook = _NewsHook(sys.unraisablehook)


class _NewsHook:
  """Passes exceptions on to the hook before, except for what follows from a failed save.

  Once one file could not be written, Orbax closes its event loop. TensorStore's threads then hand
  the results of the other files to that loop, and report what asyncio raises to this hook.
  """

  def __init__(self, before: Callable):
    self._before = before

  def __call__(self, unraisable: Any) -> None:
    if not _of_a_closed_loop(unraisable.exc_value):
      self._before(unraisable)


def _is_news(record: logging.LogRecord) -> bool:
  error = record.exc_info[1] if record.exc_info else None
  if record.name == "absl":
    return error is None or "orbax" not in Path(record.pathname).parts
  return not _of_a_closed_loop(error)


def _of_a_closed_loop(error: BaseException | None) -> bool:
  return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
