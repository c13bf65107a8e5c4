"""Accuracy against tokens a pass, on problems whose answers can be checked.

    python -m refine_jax.evaluate --model=DIR --data=test.parquet \
        --modes=ar,exact,fixed:2,threshold:0.9 --block_sizes=4,8,16,32 --output=results

Writes results.json, the answers, and accuracy.png where matplotlib is there; ends with the last
setting's `solved=.. tokens_per_pass=..`. Each setting is written when it is done, to
OUTPUT.unfinished-PID, which becomes OUTPUT at the end. A problem that cannot be answered or scored
(its prompt is null, too long or no prompt, its answer is null) counts as not solved; it is named,
and counted as not_answered.
"""

import argparse
import collections
import operator
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from refine_jax.cli import entry_point, whole_number
from refine_jax.decoding import generation, loading
from refine_jax.decoding.drafts import KINDS
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import DRAFTS, MODES, Options, chooses
from refine_jax.decoding.prompts import refusals
from refine_jax.errors import UserError
from refine_jax.evaluation import plot, reading, report, scoring
from refine_jax.hf import export as hf_export

_NAMED = 10  # bad rows in the terminal; all are in the answers


class Setting(NamedTuple):
  """One way to decode: the mode as it was given, and options of `generation.generate`."""

  name: str
  options: dict


def parse_mode(text: str) -> dict:
  """ "exact", "ar", "fixed:2" (passes), "threshold:0.9" (probability), "exact:ngram" (draft).

  A budget may follow its draft: "exact:budget:16".
  """
  mode, *values = text.split(":")
  result: dict[str, Any] = {"mode": mode}
  budgeted = [name for name in KINDS if KINDS[name].budgeted]
  if len(values) > 1 and values[-2] in budgeted and values[-1].isdecimal():
    result["budget"] = int(values.pop())
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


def settings(modes: str, block_sizes: str) -> list[Setting]:
  """Every mode with every block size; "ar", and "exact" that chooses its drafts, have none.

  Raises:
    UserError: a mode, size or draft that cannot be, or one that is there twice.
  """
  sizes = _sizes(block_sizes)
  result = []
  for text in modes.split(","):
    options = parse_mode(text)
    own = {"ar": [1]}.get(text, [None] if chooses(Options(**options)) else sizes)
    result += [Setting(text, options | {"block_size": size}) for size in own]
  for index, setting in enumerate(result):
    Options(**setting.options)
    if setting in result[:index]:
      size = setting.options["block_size"]
      raise UserError(
        f"--modes={modes} with --block_sizes={block_sizes} has {setting.name}"
        f"{f' with blocks of {size}' if size else ''} twice; name it once."
      )
  return result


def _sizes(text: str) -> list[int]:
  try:
    sizes = [int(size) for size in text.split(",")]
  except ValueError:
    raise UserError(f"--block_sizes={text!r} must be numbers with commas between.") from None
  for size in sizes:  # some modes read none of them
    Options(block_size=size)
  return sizes


def evaluate(
  model: Model,
  rows: list[dict],
  score: scoring.Scorer,
  *,
  batch_size: int,
  prompt_key: str = "prompt",
  refused: Mapping[int, str] = {},
  **options: Any,
) -> tuple[dict, list[dict]]:
  """Answers and scores all rows with one setting of `generation.attempt`.

  Args:
    batch_size: how many decode at a time; a row that ends makes room for the next.
    refused: why rows, by their index, cannot be answered (`prompts.refusals`). They take no part
      in decoding, and count as not solved.

  Returns:
    a dict of numbers, and the answers, one a row. The numbers: solved and its interval;
    tokens_per_pass, over rows that stopped, since rows that loop to their limit would inflate it;
    not_stopped; not_answered, the rows that could not be answered or scored; tokens;
    seconds_per_problem without compilation; solved by task.
  """
  outcomes = [_outcome(row, prompt_key, refused.get(i)) for i, row in enumerate(rows)]
  answered = [i for i in range(len(rows)) if i not in refused]
  prompts = [rows[i][prompt_key] for i in answered]
  out = generation.attempt(model, prompts, slots=min(batch_size, len(prompts)), **options)
  texts = out.texts or [""] * len(prompts)
  for place, i in enumerate(answered):
    outcomes[i] |= {
      "text": texts[place],
      "stopped": out.stopped[place],
      "tokens": len(out.tokens[place]),
      "passes": out.passes[place],
    }
    if place in out.not_finite:
      outcomes[i] |= {"stopped": False, "reason": generation.NOT_FINITE}
      continue
    try:
      outcomes[i]["solved"] = score(texts[place], rows[i])
    except scoring.Unscorable as error:
      outcomes[i]["reason"] = str(error)
  seconds = out.prefill_seconds + out.decode_seconds
  return _numbers(outcomes, len(answered), seconds), outcomes


def _outcome(row: dict, prompt_key: str, reason: str | None) -> dict:
  """What is known of a row before it is answered."""
  return {
    "task": str(row.get("task", "all")),
    "prompt": row.get(prompt_key),
    "answer": row.get("answer"),
    "text": None,
    "solved": False,
    "stopped": False,
    "tokens": 0,
    "passes": 0,
  } | ({"reason": reason} if reason else {})


def _numbers(outcomes: list[dict], answered: int, seconds: float) -> dict:
  by_task = collections.defaultdict(list)
  for outcome in outcomes:
    by_task[outcome["task"]].append(outcome["solved"])
  solved = sum(o["solved"] for o in outcomes)
  stopped = [o for o in outcomes if o["stopped"]]
  low, high = report.wilson(solved, len(outcomes))
  return {
    "problems": len(outcomes),
    "solved": solved / len(outcomes),
    "solved_low": low,
    "solved_high": high,
    "tokens_per_pass": sum(o["tokens"] for o in stopped)
    / max(sum(o["passes"] for o in stopped), 1),
    "not_stopped": answered - len(stopped),
    "not_answered": sum("reason" in o for o in outcomes),
    "tokens": sum(o["tokens"] for o in outcomes),
    "seconds_per_problem": seconds / max(answered, 1),
    "by_task": {task: sum(v) / len(v) for task, v in sorted(by_task.items())},
  }


def unanswerable(
  model: Model, problems: reading.Rows, prompt_key: str, chat_template: str = ""
) -> dict[int, str]:
  """Index -> why the row cannot be answered or scored; the rows are named on standard error.

  Raises:
    UserError: no row can be answered.
  """
  prompts = [row[prompt_key] for row in problems.rows]
  refused = refusals(model, prompts, chat_template)
  for index, row in enumerate(problems.rows):
    try:
      scoring.right_answer(row)
    except scoring.Unscorable as error:
      refused.setdefault(index, str(error))
  named = [f"{problems.places[i]}: {refused[i]}" for i in sorted(refused)]
  if len(refused) == len(prompts):
    raise UserError(f"No problem can be answered. {named[0]}")
  for text in named[:_NAMED]:
    print(f"not answered: {text}", file=sys.stderr)
  if len(named) > _NAMED:
    print(f"not answered: {len(named) - _NAMED} rows more", file=sys.stderr)
  return refused


def parse() -> argparse.Namespace:
  """The command line; what can be said of a value by itself is checked."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  add = parser.add_argument
  add("--model", required=True, help="Hugging Face directory, hub name or workdir")
  add("--data", required=True, help="parquet or JSON lines with prompt and answer")
  add(
    "--modes",
    default="ar,exact",
    help="ar, exact, fixed:PASSES, threshold:PROBABILITY; a draft may follow: exact:branches,"
    " exact:budget:TOKENS",
  )
  add(
    "--block_sizes",
    default="4,8,16,32",
    help="tokens a pass can commit; `exact` without a draft chooses its own",
  )
  add("--scorer", default="auto", help="auto, " + ", ".join(scoring.SCORERS))
  add("--prompt_key", default="prompt")
  add("--max_new_tokens", type=whole_number("--max_new_tokens", 1), default=256)
  add("--batch_size", type=whole_number("--batch_size", 1), default=64)
  add("--limit", type=whole_number("--limit", 0), default=0, help="rows; 0: all")
  add("--dtype", help=f"{', '.join(hf_export.DTYPES)}; default: as stored")
  add("--output", help="a new directory for results.json and accuracy.png")
  return parser.parse_args()


@entry_point
def main() -> None:
  arguments = parse()
  chosen = settings(arguments.modes, arguments.block_sizes)
  problems = reading.read(
    arguments.data, arguments.limit, "--data", (arguments.prompt_key, "answer")
  )
  score = scoring.choose(arguments.scorer, problems.columns)
  with report.directory(arguments.output) as output:
    results = _run(arguments, chosen, problems, score, output)
    for text in report.task_lines(results):
      print(text)
    if output and not plot.accuracy(results, output.unfinished / "accuracy.png"):
      print("no accuracy.png: matplotlib is not installed (pip install -e '.[plot]')")
  last = results[-1]
  if len(results) > 1:
    print(f"mode={last['mode']} block_size={report.size(last)}", end=" ")
  print(f"solved={last['solved']:.3f} tokens_per_pass={last['tokens_per_pass']:.2f}")


def _run(
  arguments,
  chosen: list[Setting],
  problems: reading.Rows,
  score: scoring.Scorer,
  output: report.Output | None,
) -> list[dict]:
  """Loads the model, and prints and writes one setting after the other."""
  model = loading.load(arguments.model, dtype=arguments.dtype)
  model.require_tokenizer()
  refused = unanswerable(model, problems, arguments.prompt_key)
  results, base = [], None  # the texts of "ar", where it comes first
  for name, options in chosen:
    numbers, answers = evaluate(
      model,
      problems.rows,
      score,
      batch_size=min(arguments.batch_size, len(problems.rows)),
      prompt_key=arguments.prompt_key,
      max_new_tokens=arguments.max_new_tokens,
      refused=refused,
      **options,
    )
    for answer, place in zip(answers, problems.places, strict=True):
      if answer.get("reason") == generation.NOT_FINITE:
        print(f"not answered: {place}: {generation.NOT_FINITE}", file=sys.stderr)
    texts = [answer.get("text") for answer in answers]
    if not results and name == "ar":
      base = texts
    elif base is not None:
      numbers["same_text_as_ar"] = sum(map(operator.eq, texts, base))
    results.append({"mode": name, "block_size": options["block_size"]} | numbers)
    print(report.line(results[-1]), flush=True)
    if output:
      place = f"{name}-{report.size(results[-1])}".replace(":", "-")
      output.add(place, _placed(answers, problems.places), results)
  return results


def _placed(answers: list[dict], places: list[str]) -> list[dict]:
  """The answers, those that have a reason with the place of their row."""
  return [
    answer | {"row": place} if "reason" in answer else answer
    for answer, place in zip(answers, places, strict=True)
  ]
