"""From a step's sums to named numbers, and from those to console, files and dashboards."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self, SupportsFloat

from tqdm import tqdm

from refine_jax import files, lock, processes
from refine_jax.config import LogConfig, NoiseConfig, ObjectiveConfig
from refine_jax.errors import UserError
from refine_jax.objective import block_metrics
from refine_jax.objective import noise as noise_lib
from refine_jax.objective import plan as plan_lib
from refine_jax.objective.draft_gradients import DRAFT
from refine_jax.objective.plan import CLEAN, Plan
from refine_jax.quoting import reason
from refine_jax.training import sinks

# On the console, in this order; the rest goes to the files.
_CONSOLE = (
  "loss_total",
  "accuracy_draft",
  "grad_norm",
  "lr",
  "noise_mean",
  "drafts_per_token",
  "tokens_per_second",
  "mfu",
)


def ratio(a: SupportsFloat, b: SupportsFloat) -> float:
  """a / b as a float, 0 where there is nothing to divide by."""
  return float(a) / float(b) if float(b) else 0.0


def term_metrics(name: str, sums: dict) -> dict:
  """Names for the objective.ROUND_SUMS of one term: loss, and shares of tokens predicted right."""
  result = {f"loss_{name}": ratio(sums["loss"], sums["count"])}
  if name == CLEAN:
    return result | {f"accuracy_{name}": ratio(sums["clean_right"], sums["count"])}
  if name == DRAFT:  # every draft is noise
    return result | {f"accuracy_{name}": ratio(sums["corrupted_right"], sums["corrupted"])}
  for kind in ("corrupted", "clean"):
    result[f"accuracy_{name}_{kind}"] = ratio(sums[f"{kind}_right"], sums[kind])
  right = sums["corrupted_right"] + sums["clean_right"]
  return result | {f"accuracy_{name}": ratio(right, sums["corrupted"] + sums["clean"])}


def train_metrics(step_metrics: dict, plan: Plan) -> dict:
  """The numbers of one training step, as train_step.train_step returns them."""
  result = {}
  for term in plan:
    result |= term_metrics(term.name, step_metrics["terms"][term.name])
  scalars = {name: float(value) for name, value in step_metrics.items() if name != "terms"}
  return result | scalars


def eval_metrics(sums: dict, objective: ObjectiveConfig, noise: NoiseConfig) -> dict:
  """Validation: sums of train_step.eval_step -> means over all tokens, by bucket, by offset."""
  plan, terms = plan_lib.plan(objective, noise), sums["terms"]
  if DRAFT in terms:
    plan = (plan_lib.LossTerm(DRAFT, 1.0, True),)
  rounds, result = plan_lib.rounds(plan), {}
  for term in rounds:
    part = {name: x.sum() for name, x in terms[term.name].items()}
    result |= term_metrics(term.name, part)
  # Whether or not it is trained on.
  result |= term_metrics(CLEAN, terms[CLEAN])
  by_weight = [(t.weight, result[f"loss_{t.name}"]) for t in rounds + plan_lib.others(plan)]
  result["loss_total"] = sum(weight * loss for weight, loss in by_weight)
  result |= block_metrics.named(sums["block"])
  if DRAFT not in terms:
    result |= _by_bucket(terms, rounds, noise_lib.from_config(noise).buckets())
  return {f"eval/{name}": value for name, value in result.items()}


def _by_bucket(terms, rounds, labels):
  result = {}
  for b, label in enumerate(labels):
    for term in rounds:
      part = {name: x[b] for name, x in terms[term.name].items()}
      if part["count"]:
        result[f"{label}/loss_{term.name}"] = ratio(part["loss"], part["count"])
  return result


class Timer:
  """Wall-clock seconds of a with block."""

  def __enter__(self) -> Self:
    self._start = time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    self.seconds = time.perf_counter() - self._start


def gibibytes(count: int) -> str:
  return f"{count / 2**30:.2f} GiB"


class Throughput:
  """Means of tokens per second, seconds a step and MFU since they were last read.

  Over many steps, because the moment at which the host sees one step end says little: where it
  looks late, the next step seems short.
  """

  def __init__(self, flops_per_token: float, peak_flops: float | None, devices: int) -> None:
    self._flops_per_token, self._devices = flops_per_token, devices
    self._peak = peak_flops
    self.restart()

  def restart(self) -> None:
    """Forgets the clock: what happened since (validation, saving) was no training step."""
    self._start: float | None = None
    self._tokens, self._steps = 0.0, 0

  def add(self, tokens: float) -> None:
    """A step of `tokens` has just ended. The first after a restart only starts the clock."""
    self._now = time.perf_counter()
    if self._start is None:
      self._start = self._now
    else:
      self._tokens, self._steps = self._tokens + tokens, self._steps + 1

  def read(self) -> dict:
    """The means, empty where no step was timed; the next ones count from here."""
    if self._start is None or not self._steps:
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

  def __init__(
    self, workdir: Path, config: LogConfig, run_config: dict, *, first: int, total: int
  ) -> None:
    self.failure: UserError | None = None
    self._active = processes.is_first()
    self._console = self._active and "console" in config.logger
    self._mute = False
    self._total = total
    self._bar: tqdm | None = None
    self._sinks: list[sinks.Sink] | None = None
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
  def keeping_failures(self, place: Path) -> Iterator[None]:
    """Keeps an error in writing `place`, or a UserError, as `failure`; the first one stays.

    Raises:
      lock.InUseError: the workdir is another run's, and not even a checkpoint may be saved there.
    """
    try:
      with files.write_errors(place):
        yield
    except lock.InUseError:
      raise
    except UserError as error:
      self.failure = self.failure or error

  def note(self, text: str) -> None:
    """A line on the console, whatever the loggers."""
    if not self._active or self._mute:
      return
    try:
      tqdm.write(text, file=sys.stdout)
      sys.stdout.flush()
    except OSError as error:  # a file on a full disk, a pipe whose reader is gone
      self._mute = True
      error = UserError(f"The output could not be written ({reason(error)}).")
      self.failure = self.failure or error

  def write(self, step: int, metrics: dict, *, line: bool = True) -> None:
    """Numbers of the model after `step` steps."""
    if not self._active:
      return
    if self._sinks is None:
      self._open_sinks()
    for sink in list(self._sinks or ()):
      before = self.failure
      with self.keeping_failures(sink.place):
        sink.write(step, metrics)
      if self._sinks and self.failure is not before:  # what it wrote last may be half a record
        self._sinks.remove(sink)
    if self._console and line:
      self.note(format_line(step, self._total, metrics))

  def advance(self) -> None:
    if self._bar is not None:
      self._bar.update()

  def close(self) -> None:
    """Ends them all. Raises nothing: it would hide the error that a run ends with."""
    if self._bar is not None:
      self._bar.close()
    for sink in self._sinks or ():
      with self.keeping_failures(sink.place):
        sink.close()
    self._sinks = []


def format_line(step: int, total: int, metrics: dict) -> str:
  """One line: losses by round first, then the other metrics."""
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
