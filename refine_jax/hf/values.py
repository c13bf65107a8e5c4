"""Values of JSON files, read strictly: of the type and between the bounds that are needed."""

from collections.abc import Mapping
from typing import Any

from refine_jax.errors import UserError
from refine_jax.quoting import shown

# Positions and places are int32.
MOST = 2**31 - 1


def count(values: Mapping, key: str, where: str, *, least: int = 1, most: int = MOST) -> int:
  """An integer of the file.

  Raises:
    UserError: it is missing, no integer, or outside the bounds.
  """
  value = values.get(key)
  if type(value) is not int or not least <= value <= most:
    raise UserError(
      f"{where}: {key} must be a whole number from {least} to {most}, not {shown(value)}."
    )
  return value


def flag(values: Mapping, key: str, where: str, *, default: bool = False) -> bool:
  """A truth value of the file.

  Raises:
    UserError: it is neither true nor false.
  """
  value = values.get(key, default)
  if type(value) is not bool:
    raise UserError(f"{where}: {key} must be true or false, not {shown(value)}.")
  return value


def number(value: Any, key: str, where: str, least: float, most: float) -> float:
  """`value` as a float.

  Raises:
    UserError: it is no number, not finite, or outside the bounds.
  """
  if type(value) not in (int, float) or not least <= value <= most:
    raise UserError(
      f"{where}: {key} must be a number from {least:g} to {most:g}, not {shown(value)}."
    )
  return float(value)
