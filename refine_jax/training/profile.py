"""A trace of some steps for TensorBoard and Perfetto, written by the first process."""

from pathlib import Path

import jax

from refine_jax import processes
from refine_jax.config import LogConfig
from refine_jax.training import metrics


class Profile:
  """The trace of config.log.profile_steps, in WORKDIR/profile."""

  def __init__(self, workdir: Path, config: LogConfig) -> None:
    self._place = workdir / "profile"
    self._first, self._last = config.profile or (0, 0)
    self._on = False

  def before_step(self, step: int, writers: metrics.Writers) -> None:
    """Begins or ends the trace where `step`, the one to come, is in it or behind it."""
    if self._first <= step <= self._last and not self._on and processes.is_first():
      with writers.keeping_failures(self._place):
        jax.profiler.start_trace(str(self._place))
        self._on = True
    elif step > self._last:
      self.stop(writers)

  def stop(self, writers: metrics.Writers) -> None:
    """Ends the trace, where one goes on."""
    if self._on:
      self._on = False
      with writers.keeping_failures(self._place):
        jax.profiler.stop_trace()
