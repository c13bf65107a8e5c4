"""Numbers as people write them, read as exact fractions: never rounded, never guessed.

What is made of digits in a text is one of three:

- a number: -5, 1,234.50, .5, 1e-3, 3×10^2, 3/4, 2 1/2, \\frac{3}{4}, 50 % (which is 1/2). A minus
  is a sign only where nothing stands before it that something can be subtracted from;
- no number, passed over: dates, times, telephone numbers, versions, ratios (3:4), names (COVID-19);
- unreadable, for its value is not certain: a calculation without its result, or a range (10-3,
  3 + 4, x - 5), a part of a formula (2^5, \\sqrt{2}), commas that group no thousands (1,5).
"""

import decimal
import enum
import math
import numbers
import re
from fractions import Fraction
from typing import Any

_MOST_DIGITS = 10_000  # written out, so that 1e999999999 takes no memory

# --- How a text is made plain before it is searched.
_CHARACTERS = str.maketrans(
  dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
  | {"\u2044": "/", "\u2215": "/", "\u22c5": "·", "\u00b7": "·", "\u2217": "*"}
)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"
_FROM_SUPERSCRIPTS = str.maketrans(_SUPERSCRIPTS, "0123456789-+")
_VULGAR = {
  character: f"{above}/{below}"
  for character, above, below in (
    *(("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5)),
    *(("⅗", 3, 5), ("⅘", 4, 5), ("⅙", 1, 6), ("⅚", 5, 6), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8)),
    *(("⅞", 7, 8), ("⅐", 1, 7), ("⅑", 1, 9), ("⅒", 1, 10)),
  )
}
_PLAINER = (
  (re.compile(rf"[{_SUPERSCRIPTS}]+"), lambda m: f"^{{{m[0].translate(_FROM_SUPERSCRIPTS)}}}"),
  (re.compile("[" + "".join(_VULGAR) + "]"), lambda m: " " + _VULGAR[m[0]]),
  (re.compile(r"\\[cdt]frac"), r"\\frac"),
  (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
  (re.compile(r"\\div(?![A-Za-z])"), "÷"),
  (re.compile(r"\\(?:left|right|!)"), ""),
  (re.compile(r"\\([%$])"), r"\1"),
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"(?<=\d)\\,(?=\d)"), "\u2009"),
  (re.compile(r"\b(?:minus|negative)\s+(?=[\d.$\\])", re.IGNORECASE), "-"),
)

# --- What is made of digits.
_GAP = r"[ \t\u00a0]{0,3}"
# Thousands by one mark throughout, none of them a plain space; or lakhs and crores.
_GROUPED = (
  *(rf"[1-9]\d{{0,2}}(?:{mark}\d{{3}})+(?!\d)" for mark in (",", "_", "['\u2019]")),
  "[1-9]\\d{0,2}(?:[\u00a0\u2009\u202f]\\d{3})+(?!\\d)",
  r"[1-9]\d?(?:,\d\d){1,20},\d{3}(?!\d)",
)
_DECIMAL = rf"(?:(?:{'|'.join(_GROUPED)}|\d+)(?:\.\d+)?|\.\d+)"
_POWER = r"10\^(?:\{[-+]?\d+\}|[-+]?\d+)"
_NUMBER = rf"(?:{_POWER}|{_DECIMAL}(?:[eE][-+]?\d+(?!\w|\.\d)|{_GAP}[×xX*·]{_GAP}{_POWER})?)"
_LATEX = rf"\\frac(?:\{{{_GAP}-?{_GAP}{_NUMBER}{_GAP}\}}\{{{_GAP}{_NUMBER}{_GAP}\}}|\d\d)"
_VALUE = (
  rf"(?:\d+{_GAP}{_LATEX}|\d+[ \u00a0]\d+/\d+|{_LATEX}|{_NUMBER}{_GAP}/{_GAP}{_NUMBER}|{_NUMBER})"
  rf"(?:{_GAP}%|{_GAP}per ?cent\b)?"
)
_OTHER = "|".join(
  (
    r"\d{4}-\d{1,2}-\d{1,2}(?![\d-])",  # dates
    r"\d{4}/\d{1,2}/\d{1,2}(?![\d/])",
    r"\d{1,2}(?P<mark>[-./])\d{1,2}(?P=mark)(?:\d{4}|\d\d)(?![\d/-])",
    r"\d+(?: ?:\d+)+(?:\.\d+)?|\d+ : \d+",  # times and ratios
    r"\d+(?:\.\d+){2,}",  # versions and addresses
    r"\+\d{1,3}(?:[-. ]\(?\d{2,4}\)?){2,4}(?![\d.,])",  # telephone numbers
    r"\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}(?!\d)",
    r"\d{3}-\d{4}(?![\d-])",
    r"0[xX][0-9a-fA-F]+",
  )
)
_THING = re.compile(rf"(?<![\d])(?P<other>{_OTHER})|(?P<value>{_VALUE})", re.IGNORECASE)

# --- What stands before a number.
_REACH = 80
_SIGN = re.compile(r"(?P<first>[ \t$€£¥₹]*)(?P<sign>[-+])(?P<gap>[ \t]*)[$€£¥₹]?[ \t]*$")
_OPERAND = re.compile(r"(?:[\d)\]}%°]|(?<![^\W\d_])[^\W\d_])$")  # a letter by itself is a variable
_OPERATOR = re.compile(r"(?:\*{1,2}|/{1,2}|[×·÷±~^_√]|[xX]|\.{2,}|…)[ \t$]*$")
_IN_FORMULA = re.compile(
  r"(?:\d\.?[A-Za-z][-+]?|[\^_]\{?|√|sqrt[({\[]?|[A-Za-z]/|±|\\pm|\b(?:log|ln|sin|cos|tan)\s?"
  r"|\\frac(?:\{[^{}]*\}|\d)?\{?\s*-?"  # one that is none of _LATEX
  r"|\b(?:plus|times|mod|modulo|divided by|multiplied by)\s)[ \t]*$"
)
_GOES_ON = re.compile(
  rf"{_GAP}(?:\^|\\pi|π|pi\b|\\sqrt|√|\*\*\d|[-+/×·÷]{_GAP}(?:[A-Za-z](?!\w)|\()|\*(?:[A-Za-z](?!\w)|\())"
)
_NAME = re.compile(r"[^\W\d_]{2,}-$")
_COMMA = re.compile(r"\d,$")
_GROUPS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})* $")


class _No(enum.Enum):
  """Why a thing gives no number: it is none, or nobody can tell which."""

  PASS = enum.auto()
  UNREADABLE = enum.auto()


def last_number(text: str) -> Fraction | None:
  """What the text says: its last number; None where there is none, or it is unreadable."""
  text = _plain(text)
  for thing in reversed(list(_THING.finditer(text))):
    value = _No.PASS if thing["other"] else _read(text, thing)
    if value is not _No.PASS:
      return None if value is _No.UNREADABLE else value
  return None


def whole_number_text(text: str) -> Fraction | None:
  """The number that the whole text is; None where it is anything else."""
  text = _plain(text).strip()
  thing = _THING.search(text)
  if not thing or thing["other"] or thing.end() < len(text) or text[: thing.start()] not in "-+":
    return None
  value = _read(text, thing)
  return value if isinstance(value, Fraction) else None


def of_value(value: Any) -> Fraction | None:
  """The number that a cell of a table is, a float by its shortest decimal form.

  Returns:
    None for what is not a number, and for one that is not finite.
  """
  if hasattr(value, "dtype") and hasattr(value, "item"):
    value = value.item()
  if isinstance(value, bool) or not isinstance(value, numbers.Number | decimal.Decimal):
    return None
  if isinstance(value, numbers.Rational):
    return Fraction(value)
  if not isinstance(value, float | decimal.Decimal) or not math.isfinite(value):
    return None
  return _exact(str(value))


def _plain(text: str) -> str:
  text = text.translate(_CHARACTERS)
  for pattern, replacement in _PLAINER:
    text = pattern.sub(replacement, text)
  return text


def _read(text: str, thing: re.Match) -> Fraction | _No:
  """A number with its sign, or why there is none."""
  start = thing.start()
  before = text[max(start - _REACH, 0) : start]
  line = before.rpartition("\n")[2]
  if _NAME.search(before):
    return _No.PASS
  if _GOES_ON.match(text, thing.end()) or _IN_FORMULA.search(line) or _COMMA.search(before):
    return _No.UNREADABLE
  if re.match(r"\d{3}(?!\d)", thing[0]) and _GROUPS.search(line):
    return _No.UNREADABLE
  value = thing[0]
  if value.startswith(".") and line.endswith("."):
    line, value = line + ".", value[1:]  # an ellipsis before a whole number
  sign = _SIGN.search(line)
  if _is_operand(line) or (sign and _is_operand(line[: sign.start()])):
    return _No.UNREADABLE
  if value.startswith(".") and line[-1:].isalnum():
    return _No.UNREADABLE
  negative = _negative(line, first_line=start < _REACH and "\n" not in before)
  number = _No.UNREADABLE if negative is None else _value(value)
  return number if isinstance(number, _No) else -number if negative else number


def _is_operand(line: str) -> bool:
  """Whether what follows this beginning of its line is multiplied, divided or a range's end."""
  operator = _OPERATOR.search(line)
  return bool(operator and _OPERAND.search(line[: operator.start()].rstrip(" \t$")))


def _negative(line: str, first_line: bool) -> bool | None:
  """Whether a number after this beginning of its line is negative; None: that is not certain."""
  match = _SIGN.search(line)
  if not match:
    return False
  rest, spaced = line[: match.start()], bool(match["gap"])
  if not rest.strip():
    bullet = spaced and not first_line
    return match["sign"] == "-" and not bullet
  if _OPERAND.search(rest) or rest[-1] in "-+":
    return None
  if rest[-1].isalpha() and match["sign"] == "-" and (spaced or not match["first"]):
    return None
  return match["sign"] == "-"


def _value(text: str) -> Fraction | _No:
  """A fraction from a match of _VALUE, or UNREADABLE."""
  bare = re.sub(r"\s*(?:%|per ?cent)$", "", text, flags=re.IGNORECASE)
  latex = re.fullmatch(r"(\d*)\s*\\frac(?:\{(.*)\}\{(.*)\}|(\d)(\d))", bare)
  mixed = re.fullmatch(r"(\d+)\s(\d+)/(\d+)", bare)
  if latex:
    whole, parts = latex[1], (latex[2] or latex[4], latex[3] or latex[5])
  elif mixed:
    whole, parts = mixed[1], (mixed[2], mixed[3])
  else:
    whole, parts = "", bare.split("/")
  read = [_exact(part) for part in (*parts, whole or "0")]
  exact = [part for part in read if part is not None]
  if len(exact) < len(read) or (len(parts) == 2 and not exact[1]):
    return _No.UNREADABLE
  number = exact[0] / exact[1] if len(parts) == 2 else exact[0]
  if whole:
    if not 0 < number < 1:
      return _No.UNREADABLE
    number += exact[-1]
  return number / 100 if bare != text else number


def _exact(text: str) -> Fraction | None:
  """A number of one piece; None beyond _MOST_DIGITS."""
  text = re.sub(r"[\s,_'\u2019{}]", "", text)
  text = re.sub(r"[×xX*·]10\^", "e", text).replace("10^", "1e")
  digits, _, exponent = text.lower().partition("e")
  if len(digits) > _MOST_DIGITS or len(exponent) > 6 or abs(int(exponent or 0)) > _MOST_DIGITS:
    return None
  return Fraction(decimal.Decimal(text))
