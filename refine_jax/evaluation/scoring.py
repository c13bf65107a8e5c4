"""Whether an answer solves its problem."""

import functools
import json
import re

from refine_jax.errors import UserError

_MARK = "Answer:"
# Of the generators' settings the scorers of reasoning-gym read none but the metadata of a row;
# the data set must be made all the same, and any seed does.
_SEED = 0


def answer_of(text: str) -> str:
  """What follows the last "Answer:", or the whole text where there is none."""
  return text.rsplit(_MARK, 1)[-1].strip()


def exact(text: str, row: dict) -> bool:
  return answer_of(text) == str(row["answer"]).strip()


def numeric(text: str, row: dict) -> bool:
  """The last number of the answer equals the right one; thousands' commas are read over."""

  def last_number(s):
    found = re.findall(r"-?\d+(?:\.\d+)?", s.replace(",", ""))
    return float(found[-1]) if found else None

  number = last_number(answer_of(text))
  return number is not None and number == last_number(str(row["answer"]))


def reasoning_gym(text: str, row: dict) -> bool:
  """reasoning-gym's own scorer, at its full mark: partial credit is not solved.

  Args:
    row: with task, answer, prompt, and meta, the JSON of the problem's metadata.
  """
  if _MARK not in text:
    return False
  entry = {
    "question": row["prompt"],
    "answer": row["answer"],
    "metadata": json.loads(row["meta"]),
  }
  return _task(row["task"]).score_answer(answer_of(text), entry) == 1.0


@functools.cache
def _task(name: str):
  try:
    import reasoning_gym as gym
  except ImportError:
    raise UserError(
      "The scorer reasoning_gym needs a package: pip install -e '.[tasks]'."
    ) from None
  return gym.create_dataset(name, seed=_SEED, size=1)


def math_verify(text: str, row: dict) -> bool:
  """The last mathematical expression equals the right one (the package math-verify)."""
  try:
    import math_verify as library
  except ImportError:
    raise UserError("The scorer math_verify needs a package: pip install -e '.[eval]'.") from None
  # LaTeX without dollar signs is not looked for; numbers are, with and without.
  right = library.parse(f"${row['answer']}$") or library.parse(str(row["answer"]))
  return library.verify(right, library.parse(answer_of(text)))


SCORERS = {
  "exact": exact,
  "numeric": numeric,
  "reasoning_gym": reasoning_gym,
  "math_verify": math_verify,
}


def choose(name: str, row: dict):
  """The scorer of this name; "auto": reasoning-gym's for rows with task and meta, else exact.

  Raises:
    UserError: no such scorer, or the rows lack what it reads.
  """
  if name == "auto":
    name = "reasoning_gym" if row.keys() >= {"task", "meta"} else "exact"
  if name not in SCORERS:
    raise UserError(f"--scorer={name} is not known; it is one of auto, {', '.join(SCORERS)}.")
  needed = {"answer"} | ({"task", "meta", "prompt"} if name == "reasoning_gym" else set())
  missing = sorted(needed - row.keys())
  if missing:
    raise UserError(f"The scorer {name} reads the columns {', '.join(missing)}, which are missing.")
  return SCORERS[name]
