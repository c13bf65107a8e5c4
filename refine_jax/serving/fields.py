"""The fields of a JSON body: each read once and checked, or refused by name.

null is as good as absent. A field that is not read and not among those that change nothing is an
error: nothing is accepted and ignored.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from refine_jax.quoting import shown
from refine_jax.serving.refusals import Refused


class Fields:
  """The fields of one request."""

  def __init__(self, body: bytes) -> None:
    """Parses the body.

    Raises:
      Refused: it is no JSON object, or has a name twice.
    """
    try:
      values = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
      why = "too deep" if isinstance(error, RecursionError) else str(error)
      raise Refused(400, f"The body is not JSON: {why}", code="invalid_json") from None
    if not isinstance(values, dict):
      raise Refused(400, "The body must be a JSON object.", code="invalid_json")
    self._values = {name: value for name, value in values.items() if value is not None}
    self._read: set[str] = set()

  def value(self, name: str, default: Any = None) -> Any:
    """The field as it is."""
    self._read.add(name)
    return self._values.get(name, default)

  def whole(self, name: str, default: Any, least: int, most: int) -> Any:
    """A whole number within bounds, or the default."""
    value = self.value(name)
    good = type(value) is int
    if value is None:
      return default
    self.require(name, good and least <= value <= most, f"a whole number from {least} to {most}")
    return value

  def number(self, name: str, default: float, least: float, most: float) -> float:
    """A number within bounds, or the default."""
    value = self.value(name, default)
    good = type(value) in (int, float)
    self.require(name, good and least <= value <= most, f"a number from {least:g} to {most:g}")
    return float(value)

  def truth(self, name: str) -> bool:
    """True or false; false where it is absent."""
    value = self.value(name, False)
    self.require(name, isinstance(value, bool), "true or false")
    return value

  def require(self, name: str, good: bool, what: str) -> None:
    """Raises Refused, which says what the field must be, unless it is good."""
    if not good:
      there = name in self._values
      found = f"is {shown(self._values[name])}" if there else "is missing"
      raise Refused(400, f"{name} {found}; it must be {what}.", param=name)

  def refuse_rest(self, neutral: Mapping[str, tuple], ignored: frozenset[str]) -> None:
    """Refuses every field that was not read.

    Args:
      neutral: fields that are not supported, and their values that ask for nothing.
      ignored: fields that say nothing of the answer.

    Raises:
      Refused: names the first such field, and the nearest that is known.
    """
    for name, value in self._values.items():
      if name in self._read or name in ignored:
        continue
      if name in neutral:
        # Python has True equal to 1.
        if not any(value == one and type(value) is type(one) for one in neutral[name]):
          raise Refused(
            400, f"{name} is not supported; leave it out.", param=name, code="unsupported_parameter"
          )
        continue
      near = difflib.get_close_matches(name, self._read | set(neutral), n=1)
      hint = f"; do you mean {near[0]}?" if near else "."
      raise Refused(
        400,
        f"There is no field {shown(name)}{hint}",
        param=name[:80],
        code="unknown_parameter",
      )


def _once(pairs: list[tuple[str, Any]]) -> dict:
  values = dict(pairs)
  if len(values) < len(pairs):
    raise ValueError("a name occurs twice in an object")
  return values


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is no JSON number")
