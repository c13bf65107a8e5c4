"""Six kinds of verifiable reasoning problems with worked steps, from the package reasoning-gym.

    python scripts/make_tasks.py [data/tasks] [--train=20000] [--val=500] [--test=500]

Columns: prompt, target (the steps, then "Answer: .."), task, answer, steps, index and seed
(reasoning-gym's, to make the problem again), meta (JSON; what its scorer reads). reasoning-gym
draws problem i of a seed from Random(seed + i), so the splits' seeds lie far apart; a prompt is
in one split only, once.
"""

import argparse
import ast
import collections
import functools
import json
import operator
import random

import pyarrow
import pyarrow.parquet

try:
  import reasoning_gym
except ImportError:
  raise SystemExit("error: reasoning-gym is not installed; pip install -e '.[tasks]'") from None

from refine_jax import files
from refine_jax.cli import entry_point, whole_number
from refine_jax.errors import UserError
from refine_jax.evaluation import scoring

TASKS = {
  "chain_sum": {"min_terms": 2, "max_terms": 5, "min_digits": 1, "max_digits": 3},
  "simple_equations": {"min_terms": 2, "max_terms": 3, "min_value": 1, "max_value": 50},
  "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 500},
  "letter_counting": {"min_words": 3, "max_words": 8},
  "spell_backward": {"min_word_len": 3, "max_word_len": 10},
  "gsm_symbolic": {"difficulty": 1.0},
}
_SEEDS = {"test": 30_000_000, "val": 20_000_000, "train": 10_000_000}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def _chain_sum(entry):
  first, *rest = entry["metadata"]["expression"].split()
  value, lines = int(first), []
  for sign, number in zip(rest[::2], rest[1::2], strict=True):
    after = value + int(number) if sign == "+" else value - int(number)
    lines.append(f"{value} {sign} {number} = {after}")
    value = after
  return lines, str(value)


def _value(node, variable: str, x: int) -> int:
  """An expression of integers, one variable, + - * and minus signs."""
  match node:
    case ast.Expression(body=body):
      return _value(body, variable, x)
    case ast.Constant(value=number):
      return int(number)
    case ast.Name(id=name) if name == variable:
      return x
    case ast.UnaryOp(op=ast.USub(), operand=operand):
      return -_value(operand, variable, x)
    case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
      return _OPERATORS[type(op)](_value(left, variable, x), _value(right, variable, x))
  raise ValueError(f"not a linear expression: {ast.dump(node)}")


def _simple_equations(entry):
  variable = entry["metadata"]["variable"]
  left, right = entry["metadata"]["equation"].split("=")
  if variable in right:
    return None
  at = functools.partial(_value, ast.parse(left.strip(), mode="eval"), variable)
  constant = _value(ast.parse(right.strip(), mode="eval"), variable, 0)
  offset = at(0)
  slope = at(1) - offset
  if slope == 0 or at(2) != 2 * slope + offset:
    return None

  def signed(number):
    return f"+ {number}" if number >= 0 else f"- {-number}"

  rest = constant - offset
  if offset:
    lines = [
      f"{slope}*{variable} {signed(offset)} = {constant}",
      f"{slope}*{variable} = {constant} {signed(-offset)} = {rest}",
    ]
  else:
    lines = [f"{slope}*{variable} = {constant}"]
  if rest % slope:
    return None
  if slope != 1:
    lines.append(f"{variable} = {rest} / {slope} = {rest // slope}")
  return lines, str(rest // slope)


def _gcd(entry):
  a, b = sorted(entry["metadata"]["numbers"], reverse=True)
  lines = []
  while b:
    lines.append(f"{a} mod {b} = {a % b}")
    a, b = b, a % b
  return lines, str(a)


def _letter_counting(entry):
  letter, total, lines = entry["metadata"]["target_letter"], 0, []
  for word in entry["metadata"]["span"]:
    count = word.lower().count(letter)
    total += count
    lines.append(f"{word}: {count}, total {total}")
  return lines, str(total)


def _spell_backward(entry):
  word = entry["metadata"]["word"]
  backward = word[::-1]
  return [f"Letters: {' '.join(word)}", f"Reversed: {' '.join(backward)}"], backward


def _gsm_symbolic(entry):
  if float(entry["answer"]) < 0:  # impossible ages; the scorer's pattern reads no minus sign
    return None
  lines = entry["metadata"]["answer_cot"].strip().splitlines()
  return [x for x in lines if x.strip() and not x.startswith("####")], entry["answer"]


# entry -> (lines of work, the answer that they lead to), or None where they do not apply.
_STEPS = {
  "chain_sum": _chain_sum,
  "simple_equations": _simple_equations,
  "gcd": _gcd,
  "letter_counting": _letter_counting,
  "spell_backward": _spell_backward,
  "gsm_symbolic": _gsm_symbolic,
}


def build(split: str, count: int, seen: set) -> tuple[list[dict], dict]:
  """A split's rows, shuffled, and for each task how many it has."""
  names = list(TASKS)
  quota = {t: count // len(names) + (i < count % len(names)) for i, t in enumerate(names)}
  rows, made, short = [], {}, 0
  # The one task whose words can run out goes first, and chain_sum makes up for what it lacks.
  for task in sorted(names, key=lambda t: t != "spell_backward"):
    wanted = quota[task] + (short if task == "chain_sum" else 0)
    problems = reasoning_gym.create_dataset(task, seed=_SEEDS[split], size=1_000_000, **TASKS[task])
    before = len(rows)
    for index in range(6 * quota[task] + 2000):
      if len(rows) - before == wanted:
        break
      row = _row(task, problems, index, seen)
      if row:
        rows.append(row | {"index": index, "seed": _SEEDS[split]})
    made[task] = len(rows) - before
    short += max(wanted - made[task], 0)
  random.Random(_SEEDS[split]).shuffle(rows)
  return rows, made


def _row(task, problems, index, seen) -> dict | None:
  try:
    entry = problems[index]
  except (ValueError, IndexError, ZeroDivisionError):  # some draws have no problem
    return None
  prompt = entry["question"].strip()
  if prompt in seen:
    return None
  steps = _STEPS[task](entry)
  if steps is None or steps[1] != str(entry["answer"]):
    return None
  seen.add(prompt)
  return {
    "prompt": prompt,
    "target": "\n".join([*steps[0], f"Answer: {entry['answer']}"]),
    "task": task,
    "answer": str(entry["answer"]),
    "steps": True,
    "meta": json.dumps(entry["metadata"], default=str),
  }


def check(split: str, rows: list[dict]):
  """Every target must solve its own problem, and a spoilt one must not."""
  for row in rows:
    right = scoring.reasoning_gym(row["target"], row)
    if not right or scoring.reasoning_gym(row["target"] + "7", row):
      raise UserError(f"reasoning-gym's scorer disagrees with a row of {split}: {row['prompt']!r}")


@entry_point
def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("output", nargs="?", default="data/tasks")
  for split, count in (("train", 20000), ("val", 500), ("test", 500)):
    parser.add_argument(f"--{split}", type=whole_number(f"--{split}", 1), default=count)
  arguments = parser.parse_args()
  seen: set = set()
  totals = collections.Counter()
  with files.new_directory(files.local_path(arguments.output, "OUTPUT")) as temporary:
    for split in _SEEDS:
      rows, made = build(split, getattr(arguments, split), seen)
      check(split, rows)
      pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary / f"{split}.parquet")
      totals[split] = len(rows)
      print(f"{split:<6} {len(rows)} rows: " + ", ".join(f"{n} {task}" for task, n in made.items()))


if __name__ == "__main__":
  main()
