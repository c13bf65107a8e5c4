"""How a key of the configuration is declared: one line with its default, meaning and bounds."""

import dataclasses
import difflib
import functools
import math
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from refine_jax.errors import UserError
from refine_jax.quoting import shown

T = TypeVar("T")
# Bounds that keep what is made from a key in memory that a machine can have.
MOST_TOKENS = 2**24
MOST_ROWS = 2**24
# What the device's arrays hold: int32 and float32.
_LARGEST = {int: 2**31 - 1, float: 3.4e38}
_METADATA = "refine_jax.key"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
  """A declared key.

  Attributes:
    name: as in --config.NAME.
    kind: bool, int, float or str; of a sequence, that of its elements.
    sequence: whether the value is a tuple.
    default, meaning: the value where none is given, and a sentence on what it does.
    least, most: inclusive bounds, None where the kind has no order.
    above, below: exclusive bounds or None.
    choices: the values of a key that names something, or ().
    aliases: older names of choices -> today's.
    special: values with a meaning of their own, allowed besides the bounds -> that meaning.
  """

  name: str = ""
  kind: type = str
  sequence: bool = False
  default: Any
  meaning: str
  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None
  choices: tuple[str, ...] = ()
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  special: Mapping[Any, str] = dataclasses.field(default_factory=dict)

  @property
  def kind_name(self) -> str:
    return f"a sequence of {self.kind.__name__}" if self.sequence else self.kind.__name__

  def within(self, section: str) -> "Key":
    """This key under its whole name, SECTION.KEY."""
    return dataclasses.replace(self, name=f"{section}.{self.name}")

  def bounds(self) -> str:
    """'at least 1, below 2' or ''; the limits of int32 and float32 go without saying."""
    most = None if self.most == _LARGEST.get(self.kind) else self.most
    named = {"at least": self.least, "above": self.above, "at most": most, "below": self.below}
    return ", ".join(f"{word} {value}" for word, value in named.items() if value is not None)

  def values(self) -> str:
    """What the key takes, in words, beyond its type."""
    parts = [" | ".join(self.choices)] if self.choices else [self.bounds()]
    parts += [f"{shown(value)}: {meaning}" for value, meaning in self.special.items()]
    return "; ".join(p for p in parts if p)

  def convert(self, value: Any) -> Any:
    """The value as this key's type, aliases replaced.

    An int passes for a float and a list for a tuple; nothing else changes.

    Raises:
      UserError: another type, outside the bounds, not one of the choices, or not text.
    """
    if not self.sequence:
      return self._convert_one(value)
    if not isinstance(value, list | tuple):
      raise UserError(f"config.{self.name} must be {self.kind_name}, not {shown(value)}.")
    return tuple(self._convert_one(v) for v in value)

  def _convert_one(self, value):
    if self.kind is float and type(value) is int and abs(value) <= _LARGEST[float]:
      value = float(value)
    if type(value) is not self.kind:
      raise UserError(f"config.{self.name} must be {self.kind_name}, not {shown(value)}.")
    if self.kind is str:
      return self._checked_text(value)
    if self.kind in _LARGEST and value not in self.special:
      self._check_bounds(value)
    return value

  def _checked_text(self, value):
    if "\0" in value or not _encodable(value):
      raise UserError(
        f"config.{self.name}={shown(value)}: it must be text without null bytes and without"
        " halves of surrogate pairs."
      )
    if value in self.aliases:
      warn(f"config.{self.name}={value!r} is called {self.aliases[value]!r} now.")
      return self.aliases[value]
    if self.choices and value not in self.choices:
      raise UserError(
        f"config.{self.name}={shown(value)}: it is one of {', '.join(self.choices)}."
        f"{nearest(value, self.choices)}"
      )
    return value

  def _check_bounds(self, value):
    finite = isinstance(value, int) or math.isfinite(value)
    inside = (
      finite
      and (self.least is None or value >= self.least)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
      and (self.most is None or value <= self.most)
    )
    if not inside:
      wanted = self.bounds() or "finite"
      if self.most is not None and finite and value > self.most:
        wanted = f"at most {self.most}"
      specials = "".join(f", or {shown(v)}: {meaning}" for v, meaning in self.special.items())
      raise UserError(f"config.{self.name}={shown(value)}: it must be {wanted}{specials}.")


def key(
  default: T,
  meaning: str,
  *,
  least: float | None = None,
  most: float | None = None,
  above: float | None = None,
  below: float | None = None,
  choices: tuple[str, ...] = (),
  aliases: Mapping[str, str] | None = None,
  special: Mapping[Any, str] | None = None,
) -> T:
  """A dataclass field that is a key; its type is the field's annotation, see `Key` for the rest."""
  declared = Key(
    default=default,
    meaning=meaning,
    least=least,
    most=most,
    above=above,
    below=below,
    choices=choices,
    aliases=aliases or {},
    special=special or {},
  )
  # The type that checkers see is that of the value, as for dataclasses.field.
  return typing.cast(T, dataclasses.field(default=default, metadata={_METADATA: declared}))


@functools.cache
def keys_of(section: type) -> dict[str, Key]:
  """Name in the section -> key, in their order; `name` is that in the section, too."""
  hints = typing.get_type_hints(section)
  found = {}
  for field in dataclasses.fields(section):
    if _METADATA in field.metadata:
      hint, declared = hints[field.name], field.metadata[_METADATA]
      kind = typing.get_args(hint)[0] if typing.get_args(hint) else hint
      limit = _LARGEST.get(kind)
      if limit and declared.most is None:
        declared = dataclasses.replace(declared, most=limit)
      found[field.name] = dataclasses.replace(
        declared, name=field.name, kind=kind, sequence=typing.get_origin(hint) is tuple
      )
  return found


@functools.cache
def sections_of(config: type) -> dict[str, Any]:
  """Name -> dataclass of each section, in their order."""
  hints = typing.get_type_hints(config)
  return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def all_keys(config: type) -> Iterator[Key]:
  """Every key with its whole name: "seed", "data.max_length", ..."""
  yield from keys_of(config).values()
  for section, kind in sections_of(config).items():
    yield from (declared.within(section) for declared in keys_of(kind).values())


def nearest(name: str, known: Iterable[str]) -> str:
  """' Did you mean ...?' for the known name most like `name`, or ''."""
  match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" Did you mean {match[0]!r}?" if match else ""


def warn(message: str) -> None:
  """A line on stderr."""
  print(f"warning: {message}", file=sys.stderr)


def _encodable(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True
