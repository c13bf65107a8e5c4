"""An evaluation on paper: intervals and files."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_jax import files


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
  """The 95 % interval of a share (Wilson 1927)."""
  if not count:
    return 0.0, 1.0
  share, z2 = successes / count, z * z / count
  middle = (share + z2 / 2) / (1 + z2)
  half = z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
  return max(middle - half, 0.0), min(middle + half, 1.0)  # rounding may leave them outside


def plain(value: Any) -> Any:
  """A value of a table as JSON has it, the one place where that is decided.

  Numbers stay numbers where JSON has them exactly; decimals and dates become their text, bytes the
  text that they hold, NaN and infinities null, numpy's values and arrays those of Python.
  """
  if isinstance(value, dict):
    return {str(key): plain(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple | set | frozenset):
    return [plain(entry) for entry in value]
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, bytes | bytearray | memoryview):
    return bytes(value).decode("utf-8", "backslashreplace")
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  return str(value)


def to_json(value: object, indent: int | None = None) -> str:
  """JSON that any reader takes: no NaN, and every value of a table in its `plain` form."""
  return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


@dataclasses.dataclass(frozen=True)
class Output:
  """A directory of results that has its name only when it is complete.

  Until then its settings stand in NAME.unfinished-PID next to it, each written when it is done. An
  evaluation that is killed leaves that directory, which no later one takes for its own.
  """

  place: Path

  @property
  def unfinished(self) -> Path:
    return self.place.with_name(f"{self.place.name}.unfinished-{os.getpid()}")

  def add(self, name: str, answers: list[dict], results: list[dict]) -> None:
    """Writes the answers of one setting, and the numbers of all that are done."""
    write_answers(self.unfinished, name, answers)
    path = self.unfinished / "results.json"
    with files.new_file(path, replace=True) as beside:
      text = to_json(results, indent=2) + "\n"
      beside.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def directory(place: str | os.PathLike | None) -> Iterator[Output | None]:
  """An Output that gets its name when the block ends without an error; None without a place.

  Raises:
    UserError: something is at the place already, or nothing can be written there.
  """
  if not place:
    yield None
    return
  output = Output(files.local_path(place, "--output").absolute())
  files.refuse_used(output.place, "--output")
  with files.write_errors(output.unfinished):
    output.unfinished.mkdir(parents=True)
  try:
    yield output
  except BaseException:
    if any(output.unfinished.iterdir()):
      print(f"The settings that were done are in {output.unfinished}.", file=sys.stderr)
    else:
      output.unfinished.rmdir()
    raise
  with files.write_errors(output.place):
    if output.place.exists():
      output.place.rmdir()  # empty, or this refuses
    output.unfinished.rename(output.place)


def write_answers(directory: Path, name: str, answers: list[dict]) -> None:
  """A JSON object a line, to be read by people and by other scorers."""
  path = directory / f"answers-{name}.jsonl"
  with files.write_errors(path):
    directory.mkdir(parents=True, exist_ok=True)
    # A lone surrogate becomes its escape, which JSON has as well.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
      file.writelines(to_json(answer) + "\n" for answer in answers)


def size(result: dict) -> str:
  """A setting's block size in words: "auto" where the sampler chose it."""
  return str(result["block_size"] or "auto")


def line(result: dict) -> str:
  """The printed line of one setting's numbers."""
  unanswered = result["not_answered"]
  return (
    f"{result['mode']:<14} block {size(result):<4} solved {result['solved']:.1%}"
    f" [{result['solved_low']:.1%}, {result['solved_high']:.1%}]"
    f"  tokens/pass {result['tokens_per_pass']:.2f}  not stopped {result['not_stopped']}"
    + (f"  not answered {unanswered}" if unanswered else "")
    + (f"  same text as ar {result['same_text_as_ar']}" if "same_text_as_ar" in result else "")
    + f"  {result['seconds_per_problem'] * 1e3:.1f} ms a problem"
  )


def task_lines(results: list[dict]) -> Iterator[str]:
  """For each task the shares that the settings solved."""
  for task in results[-1]["by_task"]:
    yield f"  {task:<18} " + "  ".join(f"{r['by_task'][task]:6.1%}" for r in results)
