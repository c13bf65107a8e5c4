"""Trains and evaluates the recipes with several seeds, and writes what came of it.

    python scripts/make_smollm2.py models/smollm2-135m
    python scripts/make_tasks.py data/tasks
    python scripts/experiment_tasks.py --runs=runs/experiment --output=docs/results/tasks.json

Every run has the same data, steps and tokens a step. What is there already is not done again: the
same command goes on where it stopped. Arguments that it does not know go to every training.

Seeds may run side by side, each in a process with its own --seeds, --output and --timed=0. The
command with all seeds then only reads what they left, and takes the time of single answers.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from refine_jax import files
from refine_jax.cli import entry_point, whole_number
from refine_jax.config import recipes
from refine_jax.errors import UserError
from refine_jax.evaluation import evaluate, reading, report, scoring
from refine_jax.evaluation import plot as accuracy_plot
from refine_jax.hf import export as hf_export

# The modes that each recipe is decoded with, and how many of the seeds it gets.
_MODES = {
  "ar_sft": ("ar,exact:ngram", None),
  "uniform": ("ar,exact:tail,fixed:2", 1),
  "blocks": ("ar,exact:branches,exact:tail,threshold:0.99:branches", None),
  # On the base that ar_sft of the same seed gives; `ar` is that base's own text.
  "gated": ("ar,exact:branches", None),
}
# What older files of results call a recipe.
_OLDER_NAMES = {"best": "blocks", "document": "uniform"}
# What is averaged over the seeds -> its name in an evaluation.
_NUMBERS = {
  name: name for name in ("solved", "tokens_per_pass", "seconds_per_problem", "not_stopped")
} | {"same_text_as_base": "same_text_as_ar"}


def run_all(arguments, extra: list[str]) -> dict:
  """recipe -> seed -> the settings of its results.json."""
  results: dict = {}
  for recipe in arguments.recipes:
    modes, most = _MODES[recipe]
    for seed in arguments.seeds[:most]:
      workdir = arguments.runs / f"{recipe}-{seed}"
      evaluation = workdir / "evaluation"
      if not (evaluation / "results.json").exists():
        _command(
          "refine_jax.main",
          f"--config={arguments.config}:{recipe}",
          f"--workdir={workdir}",
          f"--config.seed={seed}",
          *(_on_base(arguments, seed) if recipe == "gated" else ()),
          *extra,
        )
        _evaluate(
          arguments,
          workdir,
          evaluation,
          modes,
          arguments.block_sizes,
          arguments.dtype,
          f"--batch_size={arguments.batch_size}",
        )
      results.setdefault(recipe, {})[seed] = json.loads((evaluation / "results.json").read_text())
  return results


def _on_base(arguments, seed: int) -> list[str]:
  """Exports the base of a gated adapter, where it is not yet, and names it to the training.

  Raises:
    UserError: there is no ar_sft run of that seed.
  """
  workdir = arguments.runs / f"ar_sft-{seed}"
  if not (workdir / "checkpoints").is_dir():
    raise UserError(
      f"The recipe gated trains on what ar_sft of seed {seed} gave, and {workdir} is not there;"
      " give --recipes=ar_sft,gated."
    )
  base = workdir / "base"
  if not base.exists():
    script = Path(__file__).with_name("export_hf.py")
    command = [sys.executable, script, f"--workdir={workdir}", f"--output={base}"]
    if subprocess.run([*command, "--dtype=float32"]).returncode:
      raise UserError(f"{workdir} could not be exported; what the script said is above.")
  return ["--config.model.config=", f"--config.model.pretrained={base}"]


def wall_clock(arguments, recipe: str) -> dict:
  """Seconds a problem, one at a time in bfloat16, of the first seed: ar next to exact.

  Returns:
    "seconds_per_problem", "tokens_per_pass" and, over ar, "speedup", each by the setting's name as
    `summarise` has it.
  """
  workdir = arguments.runs / f"{recipe}-{arguments.seeds[0]}"
  output = workdir / "one_at_a_time"
  if not (output / "results.json").exists():
    _evaluate(
      arguments,
      workdir,
      output,
      "ar,exact:branches",
      arguments.block_sizes,
      "bfloat16",
      "--batch_size=1",
      f"--limit={arguments.timed}",
    )
  results = {recipe: {"0": json.loads((output / "results.json").read_text())}}
  (modes,) = summarise(results, arguments.block_size).values()
  timed = {
    number: {name: entry[number] for name, entry in modes.items()}
    for number in ("seconds_per_problem", "tokens_per_pass")
  }
  seconds = timed["seconds_per_problem"]
  speedup = {name: seconds["ar"] / x for name, x in seconds.items() if name != "ar"}
  return timed | {"speedup": speedup}


def _evaluate(arguments, workdir, output, modes, block_sizes, dtype, *options):
  _command(
    "refine_jax.evaluate",
    f"--model={workdir}",
    f"--data={arguments.test}",
    f"--modes={modes}",
    f"--block_sizes={block_sizes}",
    f"--output={output}",
    f"--scorer={arguments.scorer}",
    f"--dtype={dtype}",
    f"--max_new_tokens={arguments.max_new_tokens}",
    *options,
  )


def _command(module, *options):
  if subprocess.run([sys.executable, "-m", module, *options]).returncode:
    raise UserError(f"python -m {module} {' '.join(options)} failed; what it said is above.")


def summarise(results: dict, block_size: int) -> dict:
  """recipe -> mode -> means over the seeds, with the seeds' own values.

  The first setting of a mode with blocks of block_size stands under the mode's name ("exact"), the
  others under their own ("exact_tail", "exact_branches@8").
  """
  summary: dict = {}
  for recipe, by_seed in results.items():
    entries = summary.setdefault(recipe, {})
    for i, setting in enumerate(next(iter(by_seed.values()))):
      mode, block = setting["mode"], setting["block_size"]
      name, others = mode.split(":")[0], block not in (None, 1, block_size)
      if others or name in entries:
        name = mode.replace(":", "_") + (f"@{block}" if others else "")
      entry = {"setting": mode, "block_size": block, "problems": setting["problems"]}
      for number, name_there in _NUMBERS.items():
        if name_there not in setting:
          continue
        values = [seed_results[i][name_there] for seed_results in by_seed.values()]
        entry[number] = statistics.mean(values)
        entry.setdefault("seeds", {})[number] = dict(zip(by_seed, values, strict=True))
      entries[name] = entry
  return summary


def read_summary(path: Path) -> dict:
  """A summary that an earlier call wrote, its recipes under their names of today.

  Raises:
    UserError: no such file, or it is no summary.
  """
  try:
    summary = json.loads(path.read_text(encoding="utf-8"))
    return {_OLDER_NAMES.get(recipe, recipe): dict(modes) for recipe, modes in summary.items()}
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise UserError(f"{path} is no file of results to be drawn: {error}") from error


def plot(summary: dict, path: Path) -> bool:
  """evaluation.plot of every setting, its seeds' problems taken together."""
  rows = []
  for recipe, modes in summary.items():
    for entry in modes.values():
      problems = entry["problems"] * len(entry["seeds"]["solved"])
      low, high = report.wilson(round(entry["solved"] * problems), problems)
      mode = {"mode": f"{recipe} {entry['setting']}", "solved_low": low, "solved_high": high}
      rows.append(entry | mode)
  return accuracy_plot.accuracy(rows, path)


def table(summary: dict) -> str:
  lines = [
    "| recipe | mode | block | solved | tokens a pass | not stopped |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for recipe, modes in summary.items():
    for entry in modes.values():
      seeds = entry["seeds"]["solved"].values()
      spread = f" ({min(seeds):.1%} to {max(seeds):.1%})" if len(seeds) > 1 else ""
      lines.append(
        f"| {recipe} | {entry['setting']} | {entry['block_size']} | {entry['solved']:.1%}{spread}"
        f" | {entry['tokens_per_pass']:.2f} | {entry['not_stopped']:.1f} |"
      )
  return "\n".join(lines)


def parse() -> tuple[argparse.Namespace, list[str]]:
  """The command line, and what of it is the trainings'.

  Raises:
    UserError: a value that an evaluation would refuse, which comes after hours of training.
  """
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--runs", default="runs/experiment", help="a directory for all runs")
  add("--output", required=True, help="JSON; replaced by each call")
  add("--config", default="configs/smollm2_tasks.py")
  add("--test", default="data/tasks/test.parquet")
  add("--recipes", default=",".join(_MODES))
  add("--seeds", default="0,1,2", help="uniform gets the first alone")
  add("--block_sizes", default="8,16")
  add(
    "--block_size",
    type=whole_number("--block_size", 1),
    default=16,
    help="whose results have plain names",
  )
  add("--scorer", default="auto")
  add("--dtype", default="float32", help="of the parameters while decoding")
  add("--max_new_tokens", type=whole_number("--max_new_tokens", 1), default=256)
  add("--batch_size", type=whole_number("--batch_size", 1), default=128)
  add(
    "--timed",
    type=whole_number("--timed", 0),
    default=100,
    help="problems answered one at a time for wall-clock; 0: none",
  )
  add(
    "--redraw",
    action="store_true",
    help="run nothing: table and plot of what --output holds, recipes by their names of today",
  )
  arguments, extra = parser.parse_known_args()
  if arguments.redraw and extra:
    parser.error(f"--redraw trains nothing that {' '.join(extra)} could go to")
  arguments.runs = files.local_path(arguments.runs, "--runs")
  arguments.output = files.local_path(arguments.output, "--output")
  arguments.recipes = [recipes.canonical(name) for name in arguments.recipes.split(",")]
  arguments.seeds = [whole_number("--seeds", 0)(seed) for seed in arguments.seeds.split(",")]
  if arguments.redraw:
    return arguments, extra
  for recipe in arguments.recipes:
    evaluate.settings(_MODES[recipe][0], arguments.block_sizes)
  hf_export.check_dtype(arguments.dtype)
  problems = reading.read(arguments.test, 1, "--test", ("prompt", "answer"))
  scoring.choose(arguments.scorer, problems.columns)
  return arguments, extra


@entry_point
def main():
  arguments, extra = parse()
  if arguments.redraw:
    summary = read_summary(arguments.output)
  else:
    summary = summarise(run_all(arguments, extra), arguments.block_size)
  files.write_json(arguments.output, summary)
  plot(summary, arguments.output.with_suffix(".png"))
  print(table(summary))
  timed = {
    recipe: wall_clock(arguments, recipe)
    for recipe in arguments.recipes
    if recipe in ("blocks", "gated") and arguments.timed and not arguments.redraw
  }
  if timed:
    files.write_json(arguments.output.with_stem(f"{arguments.output.stem}_one_at_a_time"), timed)
  for recipe, numbers in timed.items():
    for name, speedup in numbers["speedup"].items():
      print(f"one at a time, {recipe}: {name} answers {speedup:.2f} times as fast as ar")


if __name__ == "__main__":
  main()
