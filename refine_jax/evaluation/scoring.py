"""Whether an answer solves its problem."""

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable

from refine_jax.errors import UserError
from refine_jax.evaluation import rationals

# What scorers read of a row.
COLUMNS = ("answer", "task", "meta", "prompt")
_MARK = "Answer:"
# Of the generators' settings the scorers of reasoning-gym read none but the metadata of a row;
# the data set must be made all the same, and any seed does.
_SEED = 0


def answer_of(text: str) -> str:
  """What follows the last "Answer:", or the whole text where there is none."""
  return text.rsplit(_MARK, 1)[-1].strip()


class Unscorable(Exception):
  """Why a row has no score: what it lacks, whatever the model says."""


def right_answer(row: dict) -> object:
  """The row's answer; bytes as the text that they are.

  Raises:
    Unscorable: there is none.
  """
  answer = row.get("answer")
  # NaN is how pandas says null, and no bytes stand for a cell that cannot be read (parquet.py).
  if answer is None or answer == b"" or answer != answer:
    raise Unscorable("its answer is null, or cannot be read")
  return answer.decode("utf-8", "backslashreplace") if isinstance(answer, bytes) else answer


def exact(text: str, row: dict) -> bool:
  """What was answered is the right answer; by value where the column holds numbers."""
  answer, said = right_answer(row), answer_of(text)
  value = rationals.of_value(answer)
  if value is not None:
    return rationals.whole_number_text(said) == value
  return said == str(answer).strip()


def numeric(text: str, row: dict) -> bool:
  """The last number of the answer equals the right one, as fractions (rationals.py)."""
  answer = right_answer(row)
  value = rationals.of_value(answer)
  if value is None:
    value = rationals.last_number(str(answer))
  return value is not None and value == rationals.last_number(answer_of(text))


def reasoning_gym(text: str, row: dict) -> bool:
  """reasoning-gym's own scorer, at its full mark: partial credit is not solved.

  Args:
    row: with task, answer, prompt, and meta, the JSON of the problem's metadata.
  """
  answer = right_answer(row)
  try:
    entry = {"question": row["prompt"], "answer": answer, "metadata": json.loads(row["meta"])}
    task = _task(row["task"])
    return _MARK in text and task.score_answer(answer_of(text), entry) == 1.0
  except UserError:
    raise
  except Exception as error:  # whatever the row lacks of what one of a hundred scorers reads
    raise Unscorable(f"reasoning-gym cannot score it ({type(error).__name__}: {error})") from error


@functools.cache
def _task(name: str):
  gym = _library("reasoning_gym")
  return gym.create_dataset(name, seed=_SEED, size=1)


def math_verify(text: str, row: dict) -> bool:
  """The last mathematical expression equals the right one (the package math-verify)."""
  library, answer = _library("math_verify"), right_answer(row)
  # LaTeX without dollar signs is not looked for; numbers are, with and without.
  right = library.parse(f"${answer}$") or library.parse(str(answer))
  return library.verify(right, library.parse(answer_of(text)))


# The package that a scorer needs -> the extra that installs it.
_EXTRAS = {"reasoning_gym": "tasks", "math_verify": "eval"}


def _library(name: str):
  if importlib.util.find_spec(name) is None:
    raise UserError(f"The scorer {name} needs a package: pip install -e '.[{_EXTRAS[name]}]'.")
  return importlib.import_module(name)


SCORERS = {
  "exact": exact,
  "numeric": numeric,
  "reasoning_gym": reasoning_gym,
  "math_verify": math_verify,
}


Scorer = Callable[[str, dict], bool]


def choose(name: str, columns: Iterable[str]) -> Scorer:
  """The scorer of this name; "auto": reasoning-gym's for rows with task and meta, else exact.

  Args:
    columns: the names that every row has.

  Raises:
    UserError: no such scorer, its package is not installed, or the rows lack what it reads.
  """
  columns = set(columns)
  if name == "auto":
    name = "reasoning_gym" if columns >= {"task", "meta"} else "exact"
  if name not in SCORERS:
    raise UserError(f"--scorer={name} is not known; it is one of auto, {', '.join(SCORERS)}.")
  needed = {"answer"} | ({"task", "meta", "prompt"} if name == "reasoning_gym" else set())
  missing = sorted(needed - columns)
  if missing:
    raise UserError(f"The scorer {name} reads the columns {', '.join(missing)}, which are missing.")
  if name in _EXTRAS:
    _library(name)
  return SCORERS[name]
