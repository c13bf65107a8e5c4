"""From a step's sums to named numbers, and from those to console, files and dashboards."""

import contextlib
import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from refine_jax import files
from refine_jax.config import LogConfig, NoiseConfig, ObjectiveConfig
from refine_jax.errors import UserError
from refine_jax.objective import block_metrics
from refine_jax.training import sinks

# On the console, in this order; the rest goes to the files.
_CONSOLE = ("loss_total", "grad_norm", "lr", "noise_mean", "tokens_per_second", "mfu")


def ratio(a, b) -> float:
  """a / b as a float, 0 where there is nothing to divide by."""
  return float(a) / float(b) if float(b) else 0.0


def round_metrics(sums: dict) -> dict:
  """Names for objective.ROUND_SUMS [rounds]: losses and shares of tokens predicted right."""
  result = {}
  for i in range(len(sums["loss"])):
    result[f"loss_s{i}"] = ratio(sums["loss"][i], sums["count"][i])
    for kind in ("corrupted", "clean"):
      result[f"accuracy_s{i}_{kind}"] = ratio(sums[f"{kind}_right"][i], sums[kind][i])
    right = sums["corrupted_right"][i] + sums["clean_right"][i]
    result[f"accuracy_s{i}"] = ratio(right, sums["corrupted"][i] + sums["clean"][i])
  return result


def train_metrics(step_metrics: dict, *, clean: bool = False) -> dict:
  """The numbers of one training step, as train_step.train_step returns them.

  Args:
    clean: whether the first pass was on clean text (objective.clean_weight).
  """
  scalars = {k: v for k, v in step_metrics.items() if np.ndim(v) == 0}
  sums = {k: v for k, v in step_metrics.items() if np.ndim(v) == 1}
  result = {}
  if clean:
    result["loss_clean"] = ratio(sums["loss"][0], sums["count"][0])
    result["accuracy_clean"] = ratio(sums["clean_right"][0], sums["count"][0])
    sums = {k: v[1:] for k, v in sums.items()}
  result |= round_metrics(sums)
  return result | {name: float(value) for name, value in scalars.items()}


def eval_metrics(sums: dict, objective: ObjectiveConfig, noise: NoiseConfig) -> dict:
  """Validation: sums of train_step.eval_step -> means over all tokens, by rate, by offset."""
  rounds, clean = sums["rounds"], sums["clean"]
  result = round_metrics({name: x.sum(axis=1) for name, x in rounds.items()})
  result["loss_clean"] = ratio(clean["loss"], clean["count"])
  result["accuracy_clean"] = ratio(clean["clean_right"], clean["count"])
  losses = [result[f"loss_s{i}"] for i in range(objective.num_iterations)]
  result["loss_total"] = float(np.dot(losses, objective.loss_weights))
  result["loss_total"] += objective.clean_weight * result["loss_clean"]
  result |= block_metrics.named(sums["block"])
  if noise.kind == "uniform":
    result |= _by_rate(rounds, noise)
  return {f"eval/{name}": value for name, value in result.items()}


def _by_rate(rounds, noise):
  buckets = rounds["loss"].shape[1]
  edges = np.linspace(noise.noise_min, noise.noise_max, buckets + 1)
  result = {}
  for b in range(buckets):
    part = round_metrics({name: x[:, b] for name, x in rounds.items()})
    if rounds["count"][:, b].any():
      label = f"noise_{edges[b]:.2f}-{edges[b + 1]:.2f}"
      result |= {f"{label}/{k}": v for k, v in part.items() if k.startswith("loss")}
  return result


class Timer:
  """Wall-clock seconds of a with block."""

  def __enter__(self):
    self._start = time.perf_counter()
    return self

  def __exit__(self, *_):
    self.seconds = time.perf_counter() - self._start


def gibibytes(count: int) -> str:
  return f"{count / 2**30:.2f} GiB"


class Throughput:
  """Means of tokens per second, seconds a step and MFU since they were last read.

  Over many steps, because the moment at which the host sees one step end says little: where it
  looks late, the next step seems short.
  """

  def __init__(self, flops_per_token: float, peak_flops: float | None, devices: int):
    self._flops_per_token, self._devices = flops_per_token, devices
    self._peak = peak_flops
    self.restart()

  def restart(self):
    """Forgets the clock: what happened since (validation, saving) was no training step."""
    self._start, self._tokens, self._steps = None, 0.0, 0

  def add(self, tokens: float):
    """A step of `tokens` has just ended. The first after a restart only starts the clock."""
    self._now = time.perf_counter()
    if self._start is None:
      self._start = self._now
    else:
      self._tokens, self._steps = self._tokens + tokens, self._steps + 1

  def read(self) -> dict:
    """The means, empty where no step was timed; the next ones count from here."""
    if not self._steps:
      return {}
    seconds = self._now - self._start
    rate = self._tokens / seconds
    result = {"tokens_per_second": rate, "step_seconds": seconds / self._steps}
    self._start, self._tokens, self._steps = self._now, 0.0, 0
    if self._peak:
      result["mfu"] = rate * self._flops_per_token / (self._peak * self._devices)
    return result


class Writers:
  """Console, metrics.jsonl, TensorBoard and wandb; on process 0 only.

  What cannot be written while the run goes on is no exception here: it is kept as `failure`, and
  the run saves a checkpoint and ends with it.

  Args:
    first: the step that the run goes on after. At the end of a run nothing is opened before there
      is something to write: a complete run's files stay as they are.

  Raises:
    UserError: something cannot be written at the start.
  """

  def __init__(self, workdir: Path, config: LogConfig, run_config: dict, *, first: int, total: int):
    self.failure: UserError | None = None
    self._active = jax.process_index() == 0
    self._console = self._active and "console" in config.logger
    self._mute = False
    self._total = total
    self._bar, self._sinks = None, None
    if not self._active:
      return
    self._open_sinks = functools.partial(self._open, workdir, config, run_config, first)
    if "wandb" in config.logger:
      sinks.check_wandb()
    if first < total:
      self._open_sinks()
    if self._console:
      interactive = sys.stderr.isatty()
      self._bar = tqdm(
        initial=first, total=total, unit="step", disable=not interactive, dynamic_ncols=True
      )

  def _open(self, workdir, config, run_config, first):
    jsonl = sinks.MetricsFile(workdir, first=first)
    if jsonl.moved:
      self.note(
        f"metrics       {jsonl.moved} records after step {first} moved to {jsonl.replaced}:"
        " their steps are taken again"
      )
    self._sinks = [jsonl]
    if "tensorboard" in config.logger:
      self._sinks.append(sinks.TensorBoard(workdir, first=first))
    if "wandb" in config.logger:
      self._sinks.append(sinks.Wandb(workdir, config, run_config))

  @contextlib.contextmanager
  def keeping_failures(self, place: Path):
    """Keeps an error in writing `place`, or a UserError, as `failure`; the first one stays."""
    try:
      with files.write_errors(place):
        yield
    except UserError as error:
      self.failure = self.failure or error

  def note(self, text: str):
    """A line on the console, whatever the loggers."""
    if not self._active or self._mute:
      return
    try:
      tqdm.write(text, file=sys.stdout)
      sys.stdout.flush()
    except OSError as error:  # a file on a full disk, a pipe whose reader is gone
      self._mute = True
      error = UserError(f"The output could not be written ({files.reason_of(error)}).")
      self.failure = self.failure or error

  def write(self, step: int, metrics: dict, *, line: bool = True):
    """Numbers of the model after `step` steps."""
    if not self._active:
      return
    if self._sinks is None:
      self._open_sinks()
    for sink in list(self._sinks):
      before = self.failure
      with self.keeping_failures(sink.place):
        sink.write(step, metrics)
      if self.failure is not before:  # what it wrote last may be half a record
        self._sinks.remove(sink)
    if self._console and line:
      self.note(format_line(step, self._total, metrics))

  def advance(self):
    if self._bar is not None:
      self._bar.update()

  def close(self):
    """Ends them all. Raises nothing: it would hide the error that a run ends with."""
    if self._bar is not None:
      self._bar.close()
    for sink in self._sinks or ():
      with self.keeping_failures(sink.place):
        sink.close()
    self._sinks = []


def format_line(step: int, total: int, metrics: dict) -> str:
  """One line: losses by round first, then the rest of the document's metrics."""
  prefix = "eval/" if any(name.startswith("eval/") for name in metrics) else ""
  plain = {n[len(prefix) :]: v for n, v in metrics.items() if n.startswith(prefix)}
  rounds = ["loss_clean", *sorted(n for n in plain if n.startswith("loss_s"))]
  corrupted = sorted(n for n in plain if n.startswith("accuracy_s") and n.endswith("_corrupted"))
  extra = (*corrupted, "accuracy_clean", "block/run_s0", "solved", "tokens_per_pass")
  extra = extra if prefix else ()
  names = [n for n in (*rounds, *_CONSOLE, *extra) if n in plain]
  parts = [f"{n} {_short(n, plain[n])}" for n in names]
  if plain.get("skipped"):
    parts.append(f"skipped {plain['skipped']:.0f}")
  return f"{'eval ' if prefix else ''}step {step}/{total}  " + "  ".join(parts)


def _short(name, value):
  if name == "lr":
    return f"{value:.2e}"
  if name == "tokens_per_second":
    return f"{value:,.0f}"
  return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"
