"""Accuracy against tokens a pass, on problems whose answers can be checked.

    python -m refine_jax.evaluate --model=DIR --data=test.parquet \
        --modes=ar,exact,fixed:2,threshold:0.9 --block_sizes=4,8,16,32 --output=results

Writes results.json, the answers, and accuracy.png where matplotlib is there; ends with the last
setting's `solved=.. tokens_per_pass=..`.
"""

import argparse
import collections
import json
import math
import os
from pathlib import Path

import pyarrow.parquet

from refine_jax import files
from refine_jax.cli import entry_point
from refine_jax.data.parquet import expand
from refine_jax.decoding import generation, loading
from refine_jax.decoding.settings import DRAFTS, MODES
from refine_jax.errors import UserError
from refine_jax.evaluation import scoring


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
  """The 95 % interval of a share (Wilson 1927)."""
  if not count:
    return 0.0, 1.0
  share, z2 = successes / count, z * z / count
  middle = (share + z2 / 2) / (1 + z2)
  half = z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
  return middle - half, middle + half


def parse_mode(text: str) -> dict:
  """ "exact", "ar", "fixed:2" (passes), "threshold:0.9" (probability), "exact:ngram" (draft)."""
  mode, *values = text.split(":")
  result = {"mode": mode}
  if values and values[-1] in DRAFTS:
    result["draft"] = values.pop()
  number = {"fixed": ("refine_iter", int, 2), "threshold": ("tau", float, 0.9)}.get(mode)
  try:
    if number:
      key, kind, default = number
      result[key] = kind(values.pop()) if values else default
  except ValueError:
    raise UserError(f"--modes: {text!r} should be like fixed:2 or threshold:0.9.") from None
  if mode not in MODES or values:
    raise UserError(
      f"--modes: {text!r} is not known; modes are {', '.join(MODES)}, with passes or a"
      f" probability, and a draft ({', '.join(DRAFTS)}), each after a colon."
    )
  return result


def evaluate(
  model, rows: list[dict], score, *, batch_size: int, prompt_key: str = "prompt", **options
) -> tuple[dict, list[dict]]:
  """Answers and scores all rows with one setting of `generation.generate`.

  Returns:
    a dict of numbers, and the answers, one a row. The numbers: solved and its interval;
    tokens_per_pass, over rows that stopped, since rows that loop to their limit would inflate it;
    not_stopped; tokens; seconds_per_problem without compilation; solved by task.
  """
  outcomes, seconds = [], 0.0
  for start in range(0, len(rows), batch_size):
    batch = rows[start : start + batch_size]
    # The last batch is filled up, so that it needs no program of its own.
    prompts = [row[prompt_key] for row in batch + batch[:1] * (batch_size - len(batch))]
    out = generation.generate(model, prompts, first_row=start, **options)
    seconds += out.prefill_seconds + out.decode_seconds
    for i, row in enumerate(batch):
      outcomes.append(
        {
          "task": row.get("task", "all"),
          "prompt": row[prompt_key],
          "answer": row["answer"],
          "text": out.texts[i],
          "solved": score(out.texts[i], row),
          "stopped": out.stopped[i],
          "tokens": len(out.tokens[i]),
          "passes": out.passes[i],
        }
      )
  by_task = collections.defaultdict(list)
  for outcome in outcomes:
    by_task[outcome["task"]].append(outcome["solved"])
  solved = sum(o["solved"] for o in outcomes)
  stopped = [o for o in outcomes if o["stopped"]]
  low, high = wilson(solved, len(rows))
  numbers = {
    "problems": len(rows),
    "solved": solved / len(rows),
    "solved_low": low,
    "solved_high": high,
    "tokens_per_pass": sum(o["tokens"] for o in stopped)
    / max(sum(o["passes"] for o in stopped), 1),
    "not_stopped": len(rows) - len(stopped),
    "tokens": sum(o["tokens"] for o in outcomes),
    "seconds_per_problem": seconds / len(rows),
    "by_task": {task: sum(v) / len(v) for task, v in sorted(by_task.items())},
  }
  return numbers, outcomes


def read_rows(path: str, limit: int, option: str) -> list[dict]:
  rows = []
  for file in expand(path, option):
    rows += pyarrow.parquet.read_table(file).to_pylist()
  rows = rows[:limit] if limit else rows
  if not rows:
    raise UserError(f"{path} has no rows.")
  return rows


def write_answers(directory: Path, name: str, answers: list[dict]):
  """A JSON object a line, to be read by people and by other scorers."""
  directory.mkdir(parents=True, exist_ok=True)
  with open(directory / f"answers-{name}.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)


def plot(results: list[dict], path: Path) -> bool:
  """Accuracy against tokens a pass, a point a setting; False without matplotlib."""
  try:
    import matplotlib
  except ImportError:
    return False
  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
  for mode in dict.fromkeys(r["mode"] for r in results):
    points = [r for r in results if r["mode"] == mode]
    x = [r["tokens_per_pass"] for r in points]
    y = [100 * r["solved"] for r in points]
    spread = [
      [100 * (r["solved"] - r["solved_low"]) for r in points],
      [100 * (r["solved_high"] - r["solved"]) for r in points],
    ]
    axes.errorbar(x, y, yerr=spread, marker="o", capsize=2, label=mode)
    for r, px, py in zip(points, x, y, strict=True):
      if r["block_size"] > 1:
        axes.annotate(str(r["block_size"]), (px, py), (4, 4), textcoords="offset points", size=8)
  axes.set_xlabel("tokens a pass (label: block size)")
  axes.set_ylabel("solved, % (95 % interval)")
  axes.legend()
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
  return True


def _sizes(text: str) -> list[int]:
  try:
    return [int(size) for size in text.split(",")]
  except ValueError:
    raise UserError(f"--block_sizes={text!r} must be numbers with commas between.") from None


@entry_point
def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True, help="Hugging Face directory, hub name or workdir")
  parser.add_argument("--data", required=True, help="parquet with prompt and answer")
  parser.add_argument(
    "--modes",
    default="ar,exact",
    help="ar, exact, fixed:PASSES, threshold:PROBABILITY; a draft may follow: exact:branches",
  )
  parser.add_argument("--block_sizes", default="4,8,16,32", help="tokens a pass can commit")
  parser.add_argument("--scorer", default="auto", help="auto, " + ", ".join(scoring.SCORERS))
  parser.add_argument("--prompt_key", default="prompt")
  parser.add_argument("--max_new_tokens", type=int, default=256)
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--limit", type=int, default=0, help="rows; 0: all")
  parser.add_argument("--dtype", help="of the parameters; default: as stored")
  parser.add_argument("--output", help="a new directory for results.json and accuracy.png")
  arguments = parser.parse_args()
  settings = [
    (text, parse_mode(text) | {"block_size": size})
    for text in arguments.modes.split(",")
    for size in ([1] if text == "ar" else _sizes(arguments.block_sizes))
  ]
  output = files.local_path(arguments.output, "--output") if arguments.output else None
  if output:
    files.refuse_used(output)
    # Complete or not at all; what a killed evaluation left has another name.
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.new")
  rows = read_rows(arguments.data, arguments.limit, "--data")
  if arguments.prompt_key not in rows[0]:
    raise UserError(f"{arguments.data} has no column {arguments.prompt_key!r} (--prompt_key).")
  score = scoring.choose(arguments.scorer, rows[0])
  model = loading.load(arguments.model, dtype=arguments.dtype)
  model.require_tokenizer()
  results = []
  for name, options in settings:
    result, answers = evaluate(
      model,
      rows,
      score,
      batch_size=min(arguments.batch_size, len(rows)),
      prompt_key=arguments.prompt_key,
      max_new_tokens=arguments.max_new_tokens,
      **options,
    )
    results.append({"mode": name, "block_size": options["block_size"]} | result)
    print(
      f"{name:<14} block {options['block_size']:<3} solved {result['solved']:.1%}"
      f" [{result['solved_low']:.1%}, {result['solved_high']:.1%}]"
      f"  tokens/pass {result['tokens_per_pass']:.2f}  not stopped {result['not_stopped']}"
      f"  {result['seconds_per_problem'] * 1e3:.1f} ms a problem",
      flush=True,
    )
    if output:
      write_answers(unfinished, f"{name}-{options['block_size']}".replace(":", "-"), answers)
  for task in results[-1]["by_task"]:
    shares = "  ".join(f"{r['by_task'][task]:6.1%}" for r in results)
    print(f"  {task:<18} {shares}")
  if output:
    text = json.dumps(results, indent=2) + "\n"
    (unfinished / "results.json").write_text(text, encoding="utf-8")
    if not plot(results, unfinished / "accuracy.png"):
      print("no accuracy.png: matplotlib is not installed (pip install '.[plot]')")
    if output.exists():
      output.rmdir()  # empty: checked above
    unfinished.rename(output)
  last = results[-1]
  if len(results) > 1:
    print(f"mode={last['mode']} block_size={last['block_size']}", end=" ")
  print(f"solved={last['solved']:.3f} tokens_per_pass={last['tokens_per_pass']:.2f}")
