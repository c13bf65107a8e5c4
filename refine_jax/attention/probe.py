"""Trying a fast engine out on a tiny problem before it is trusted."""

from collections.abc import Callable, Iterable

import numpy as np

# Relative error that bfloat16 rounding alone explains; a wrong mask is off by tens of percent.
TOLERANCE = 0.03


def why_not(candidate: Callable, reference: Callable, names: Iterable[str]) -> str | None:
  """None if the candidate's arrays agree with the reference's, else what is wrong with it.

  Args:
    candidate, reference: give arrays, as many as there are names.
    names: of the arrays, for the message.
  """
  try:
    got = [np.asarray(x, np.float32) for x in candidate()]
  except Exception as error:  # whatever a compiler or a library raises is a reason not to use it
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
  want = [np.asarray(x, np.float32) for x in reference()]
  for name, x, y in zip(names, got, want, strict=True):
    error = np.linalg.norm(x - y) / np.linalg.norm(y)
    if not error < TOLERANCE:  # nor where it is no number
      return f"its {name} differs from the reference by {error:.2g}."
  return None
