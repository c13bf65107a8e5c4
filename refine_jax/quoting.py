"""Values, names and errors as messages quote them: in one line, cut where they are long.

They may come from files that somebody else wrote, so their length has a bound.
"""

import reprlib
from collections.abc import Sequence
from typing import Any

LONGEST = 240
_VALUE, _DEPTH = 120, 3


def shown(value: Any) -> str:
  """repr, cut where it is long, deep or refers to itself."""
  short = reprlib.Repr()
  short.maxstring = short.maxother = _VALUE
  short.maxlevel = _DEPTH
  try:
    return short.repr(value)
  except ValueError:  # Python prints no integers of more than 4,300 digits
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "a value"


def some(names: Sequence[str], most: int = 4) -> str:
  """The first of the names, and how many more there are."""
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def cut(text: str) -> str:
  """The text, or its two ends where it is longer than LONGEST characters."""
  head = LONGEST // 3
  return text if len(text) <= LONGEST else f"{text[:head]} ... {text[head + 5 - LONGEST :]}"


def reason(error: BaseException) -> str:
  """What another library's error says: its first line, or its kind where that says too little."""
  if isinstance(error, OSError) and error.strerror:
    # Where it is another file than the one that is being written, its name is the news.
    return cut(error.strerror + (f": {error.filename}" if error.filename else ""))
  first, *more = [line for line in str(error).splitlines() if line.strip()] or [""]
  text = " ".join((first, *more)) if first.rstrip().endswith(":") else first
  for tail in (" [tensorstore_spec", " See full TensorStore details"):
    text = text.split(tail)[0]
  text, kind = " ".join(text.split()), type(error).__name__
  # TensorStore puts the cause last, after each layer that it went through.
  return cut(text if " " in text else f"{kind}: {text}" if text else kind)
