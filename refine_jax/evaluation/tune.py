"""Calibrates a model's drafts, and measures which of them pay on this device.

    python -m refine_jax.tune --model=models/mine --data=val.parquet

Answers prompts of the data greedily and at temperature 1 to see how often a draft of which
probability is right, and writes the curve under "refinement" in the model's generation_config.json.
Then, for each number of rows, times a pass of each draft kind and budget, and writes
draft_plans.json beside it, which draft="auto" reads. What other devices measured stays there.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from refine_jax import files
from refine_jax.cli import entry_point, whole_number
from refine_jax.decoding import calibrate, loading, plans
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options
from refine_jax.decoding.plans import Plan
from refine_jax.decoding.requests import requests
from refine_jax.errors import UserError
from refine_jax.evaluation import reading
from refine_jax.hf import calibration as curves
from refine_jax.hf import export as hf_export
from refine_jax.hf import generation_config

_BUDGETS = (8, 16, 32, 64, 128)
_CYCLES = (4, 8, 16)
_BRANCHES = (8, 16)
# Tokens of all rows in one pass, beyond which none was ever worth it; of branches.
_MOST_TOKENS, _MOST_OF_BRANCHES = 8192, 1024
_PASSES, _REPEATS = 8, 5
_PARTS = ("calibration", "plans")


@entry_point
def main() -> None:
  arguments = parse()
  rows = _numbers("--rows", arguments.rows)
  problems = reading.read(arguments.data, arguments.limit, "--data", (arguments.prompt_key,))
  prompts = [row[arguments.prompt_key] for row in problems.rows]
  model = loading.load(arguments.model, dtype=arguments.dtype)
  place = model.directory / generation_config.NAME
  if model.refinement is None or not place.exists():
    raise UserError(f'{place} has no "refinement", so there are no drafts to tune; export a run.')
  new, parts = arguments.max_new_tokens, arguments.parts.split(",")
  if not parts or not set(parts) <= set(_PARTS):
    raise UserError(f"--parts={arguments.parts} must be of {', '.join(_PARTS)}.")
  if "calibration" in parts:
    report = calibrate.calibrate(model, prompts, new, arguments.batch_size)
    model = _write_calibration(place, report, model)
  if "plans" not in parts:
    return
  trained = (model.refinement and model.refinement.block_size) or 1
  table = {count: measure(model, prompts, count, candidates(count, trained), new) for count in rows}
  device = jax.local_devices()[0].device_kind
  known = plans.read(model.directory)
  known[device] = known.get(device, {}) | table
  files.write_json(
    model.directory / plans.NAME,
    {
      name: {str(n): [plan._asdict() for plan in found] for n, found in sorted(entries.items())}
      for name, entries in known.items()
    },
  )
  for count, found in table.items():
    best = max(found, key=lambda plan: plan.rate)
    ar = next(plan for plan in found if plan.draft == "ar")
    name = best.draft if best.draft == "ar" else f"{best.draft} {best.budget or best.block}"
    print(f"rows={count} best={name} times_ar={best.rate / ar.rate:.2f}")


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  add = parser.add_argument
  add("--model", required=True, help="an exported directory; files are written into it")
  add("--data", required=True, help="parquet or JSON lines with prompts, not those of a test")
  add("--prompt_key", default="prompt")
  add("--limit", type=whole_number("--limit", 0), default=200, help="prompts; 0: all")
  add("--rows", default="1,8,64", help="rows of a pass: the slots of engines")
  add("--max_new_tokens", type=whole_number("--max_new_tokens", 8), default=256)
  add("--batch_size", type=whole_number("--batch_size", 1), default=8)
  add("--dtype", help=f"{', '.join(hf_export.DTYPES)}; default: as stored")
  add("--parts", default=",".join(_PARTS), help="what to measure")
  return parser.parse_args()


def candidates(rows: int, block: int) -> list[Plan]:
  """The plans to be measured, "ar" first; without times and tokens."""
  found = [Plan("ar", 1, 0, 1.0, 1.0)]
  for kind, sizes in (("budget", _BUDGETS), ("cycle", _CYCLES)):
    fitting = [n for n in sizes if 1 < block and n <= block**2 and rows * n <= _MOST_TOKENS]
    found += [Plan(kind, min(block, n), n, 1.0, 1.0) for n in fitting]
  fitting = [n for n in _BRANCHES if 1 < n <= block and rows * n**2 <= _MOST_OF_BRANCHES]
  found += [Plan("branches", n, 0, 1.0, 1.0) for n in fitting]
  return found


def measure(
  model: Model, prompts: Sequence, rows: int, wanted: Sequence[Plan], new: int
) -> tuple[Plan, ...]:
  """Times passes of plans over `rows` rows, and counts the tokens that they give.

  Args:
    wanted: by the tokens of their passes, of which more never count for less time.
    new: tokens of an answer, at most.
  """
  some = [prompts[i % len(prompts)] for i in range(max(rows, min(len(prompts), 4 * rows + 28)))]
  engine = engine_with(model, rows, wanted, some, new)
  found: list[Plan] = []
  for plan in wanted:
    engine.use([plan])
    milliseconds = 1e3 * step_seconds(engine, some[:rows], _REPEATS)
    least = max((p.milliseconds for p in found if p.draft in ("ar", plan.draft)), default=0.0)
    tokens, _, _ = answered(engine, some, new)
    found.append(plan._replace(milliseconds=max(milliseconds, least), tokens=max(tokens, 1.0)))
    name = plan.draft if plan.draft == "ar" else f"{plan.draft}:{plan.budget or plan.block}"
    print(
      f"rows={rows} draft={name} ms={milliseconds:.3f} tokens_per_pass={tokens:.2f}"
      f" tokens_per_second={found[-1].rate * rows * 1e3:.0f}",
      flush=True,
    )
  return tuple(found)


def engine_with(
  model: Model,
  rows: int,
  wanted: Sequence[Plan],
  prompts: Sequence,
  new: int,
  repeats: int = _REPEATS,
) -> Engine:
  """An engine whose programs for these plans are compiled, side by side.

  From now on engines of this model with so many rows choose between these plans.
  """
  model.plans.setdefault(jax.local_devices()[0].device_kind, {})[rows] = tuple(wanted)
  options = Options(draft="auto")
  engine = Engine(model, rows, options=options)
  most = max(plan.block for plan in wanted)
  longest = max(len(request.prompt) for request in requests(model, prompts, options))
  engine.warm_up(longest + max(new, (repeats + 1) * _PASSES * most))
  return engine


def step_seconds(engine: Engine, prompts: Sequence, repeats: int) -> float:
  """The median of a pass's seconds with all rows on their way; they go on, whatever they say."""
  most = max(engine.settings.most, 1)
  long = Options(draft="auto", eos_token_id=(), max_new_tokens=(repeats + 1) * _PASSES * most)
  wanted = requests(engine.model, prompts, long)
  runner = engine.entered(wanted)
  none, seconds = np.zeros(engine.slots, bool), []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    runner.decode(none, _PASSES, 1)
    seconds.append((time.perf_counter() - start) / _PASSES)
  for request in wanted:
    engine.cancel(request)
  return statistics.median(seconds[1:])


def answered(engine: Engine, prompts: Sequence, new: int) -> tuple[float, float, list[list[int]]]:
  """Tokens a pass, tokens a second without compilation, and the answers' tokens."""
  wanted = requests(engine.model, prompts, Options(draft="auto", max_new_tokens=new))
  for request in wanted:
    engine.submit(request)
  answers, before, start = {}, engine.costs, time.perf_counter()
  while engine.busy:
    answers |= {answer.request: answer for answer in engine.step()}
  seconds = time.perf_counter() - start - engine.costs.since(before).compile_seconds
  tokens = [answers[request].tokens for request in wanted]
  count, passes = sum(map(len, tokens)), sum(answer.passes for answer in answers.values())
  return count / max(passes, 1), count / seconds, tokens


def _write_calibration(place: Path, report: calibrate.Report, model: Model) -> Model:
  """Adds it to generation_config.json; returns the model with it."""
  for name in report.before:
    before, after = (max(errors[name]) for errors in (report.before, report.after))
    print(f"calibration of {name} rows, worst offset: {before:.3f} before, {after:.3f} after")
  values = json.loads(place.read_text(encoding="utf-8"))
  values["refinement"]["calibration"] = curves.describe(report.calibration)
  files.write_json(place, values)
  assert model.refinement is not None
  trained = dataclasses.replace(model.refinement, calibration=report.calibration)
  return dataclasses.replace(model, refinement=trained)


def _numbers(option: str, text: str) -> list[int]:
  try:
    found = [int(x) for x in text.split(",")]
  except ValueError:
    found = [0]
  if min(found) < 1:
    raise UserError(f"{option}={text!r} must be whole numbers of at least 1 with commas between.")
  return found
