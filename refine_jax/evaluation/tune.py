"""Calibrates a model's drafts, and measures which of them pay on this device.

    python -m refine_jax.tune --model=models/mine --data=val.parquet

Answers prompts of the data greedily and at temperature 1 to see how often a draft of which
probability is right, and writes the curve under "refinement" in the model's generation_config.json.
Then, for each number of rows, times a pass of each draft kind and budget, and writes
draft_plans.json beside it, which draft="auto" reads. What other devices measured stays there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refine_jax import files
from refine_jax.cli import entry_point, whole_number
from refine_jax.decoding import calibrate, generation, loading, plans
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
_CYCLES = (4, 8)
# Tokens of all rows in one pass, beyond which none was ever worth it.
_MOST_TOKENS = 8192
_PASSES, _REPEATS = 8, 5


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
  new = arguments.max_new_tokens
  if not arguments.only_plans:
    report = calibrate.calibrate(model, prompts, new, arguments.batch_size)
    _write_calibration(place, report)
    model = loading.load(arguments.model, dtype=arguments.dtype)
  accepted: dict = {}
  table = {count: measure(model, prompts, count, accepted, new) for count in rows}
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
  add("--only_plans", action="store_true", help="keep the calibration that is there")
  return parser.parse_args()


def measure(
  model: Model, prompts: Sequence, rows: int, accepted: dict, new: int
) -> tuple[Plan, ...]:
  """Times passes of every kind over `rows` rows; times do not fall with the tokens of a pass.

  Args:
    accepted: (draft, block, budget) -> tokens a pass, which does not depend on the rows; filled in.
    new: tokens of the answers that it is measured with.
  """
  trained = model.refinement
  block = (trained.block_size if trained else None) or 1
  found: list[Plan] = []
  for draft, budget in _candidates(rows, block):
    options: dict[str, Any] = {"draft": draft, "block_size": block, "budget": budget}
    if draft == "ar":
      options = {"mode": "ar"}
    if draft == "cycle":
      options = {"draft": draft, "block_size": budget}
    seconds, settings = pass_seconds(model, prompts, rows, options)
    key = draft, settings.block, settings.budget
    if key not in accepted:
      out = generation.generate(
        model, prompts, slots=min(8, len(prompts)), max_new_tokens=new, **options
      )
      accepted[key] = max(out.tokens_per_pass, 1.0)
    # A pass over more tokens that took less was measured badly, or the other one was.
    least = max((plan.milliseconds for plan in found if plan.draft in ("ar", draft)), default=0.0)
    found.append(Plan(*key, max(seconds * 1e3, least), accepted[key]))
    plan = found[-1]
    print(
      f"rows={rows} draft={draft} tokens={settings.tokens} ms={plan.milliseconds:.3f}"
      f" tokens_per_pass={plan.tokens:.2f} tokens_per_second={plan.rate * rows * 1e3:.0f}",
      flush=True,
    )
  return tuple(found)


def _candidates(rows: int, block: int) -> list[tuple[str, int | None]]:
  found: list[tuple[str, int | None]] = [("ar", None)]
  if block > 1:
    found += [("budget", n) for n in _BUDGETS if n <= block**2 and rows * n <= _MOST_TOKENS]
    found += [("cycle", n) for n in _CYCLES if n <= block and rows * n <= _MOST_TOKENS]
  return found


def pass_seconds(model: Model, prompts: Sequence, rows: int, options: dict) -> tuple:
  """The median of a pass's seconds with `rows` rows on their way, and its Settings."""
  some = [prompts[i % len(prompts)] for i in range(rows)]
  # Rows go on, whatever they say.
  long = Options(eos_token_id=(), max_new_tokens=(_REPEATS + 1) * _PASSES * 16, **options)
  engine = Engine(model, rows, options=long)
  runner = engine.entered(requests(model, some, long))
  none, seconds = np.zeros(rows, bool), []
  for _ in range(_REPEATS + 1):
    start = time.perf_counter()
    runner.decode(none, _PASSES, 1)
    seconds.append((time.perf_counter() - start) / _PASSES)
  return statistics.median(seconds[1:]), engine.settings


def _write_calibration(place: Path, report: calibrate.Report) -> None:
  for name in report.before:
    before, after = (max(errors[name]) for errors in (report.before, report.after))
    print(f"calibration of {name} rows, worst offset: {before:.3f} before, {after:.3f} after")
  values = json.loads(place.read_text(encoding="utf-8"))
  values["refinement"]["calibration"] = curves.describe(report.calibration)
  files.write_json(place, values)


def _numbers(option: str, text: str) -> list[int]:
  try:
    found = [int(x) for x in text.split(",")]
  except ValueError:
    found = [0]
  if min(found) < 1:
    raise UserError(f"{option}={text!r} must be whole numbers of at least 1 with commas between.")
  return found
