"""Which drafts pay for how many rows: what `draft="auto"` chooses from, and how it chooses."""

import bisect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from refine_jax.errors import UserError

# Beside a model's config.json.
NAME = "draft_plans.json"
# "ar" or a draft kind of "exact" that plans may name.
KINDS = ("ar", "branches", "budget", "cycle")
# A pass on an H100 (shape 1.5b) over so many tokens of all rows, as a multiple of one over one
# token; between two of them the larger counts, beyond the last none.
_TOKENS = (16, 32, 128, 256, 512, 1024, 2048, 4096, 8192)
_COSTS = (1.0, 1.15, 1.35, 1.62, 2.07, 3.5, 5.9, 11.7, 23.0)
# What an adapter adds to a pass.
_ADAPTED = 1.24
# Tokens a row -> tokens a pass of a model whose blocks of 16 say 6, in proportion to those of one
# that says 10 (docs/performance.md); measured passes correct them.
_ACCEPTED = {8: 3.0, 16: 4.0, 32: 4.8, 64: 5.5, 128: 5.8}
# Where no device of the kind was measured: so few tokens of all rows cost little on any.
_SAFE_TOKENS = 64


class Plan(NamedTuple):
  """One way to run a pass.

  Attributes:
    draft: one of KINDS.
    block, budget: as in Settings; 1 and 0 of "ar".
    milliseconds: a pass; only quotients of them count.
    tokens: that a pass gives a row.
  """

  draft: str
  block: int
  budget: int
  milliseconds: float
  tokens: float

  @property
  def rate(self) -> float:
    """Tokens a millisecond and row."""
    return self.tokens / self.milliseconds


def built_in(rows: int, block: int, *, adapted: bool) -> tuple[Plan, ...]:
  """Plans for `rows` rows of a pass on a device that nobody measured, "ar" among them.

  Args:
    block: of the model's training; 1: it has no drafts to offer.
    adapted: whether drafts need an adapter.
  """
  # Kinds of devices differ in speed, not in the ratio of arithmetic to memory that decides here.
  known = any(name in jax.local_devices()[0].device_kind for name in ("H100", "H200"))
  plans = [Plan("ar", 1, 0, _cost(rows), 1.0)]
  for budget, tokens in _ACCEPTED.items():
    total = rows * budget
    if block > 1 and total <= (_TOKENS[-1] if known else _SAFE_TOKENS):
      cost = _cost(total) * (_ADAPTED if adapted else 1.0)
      plans.append(Plan("budget", min(block, budget), budget, cost, tokens))
  return tuple(plans)


def _cost(tokens: int) -> float:
  return _COSTS[min(bisect.bisect_left(_TOKENS, tokens), len(_COSTS) - 1)]


class Chooser:
  """Keeps the plan with most tokens a second, by the table and by what passes then show.

  The table's tokens a pass are those of other text; the ratio of drafts accepted here to drafts
  accepted there is taken for the same in all plans. While "ar" runs nothing is learned of it, and
  it slowly goes back to the table's.
  """

  # How much of the newest steps counts, how much better another plan must be, and how soon "ar"
  # tries again.
  _NEWEST, _BETTER, _FORGET = 0.3, 1.05, 0.005

  def __init__(self, plans: Sequence[Plan]) -> None:
    self.plans = list(plans)
    self.skill = 1.0
    self.current = max(self.plans, key=lambda plan: plan.rate)

  def observe(self, tokens: int, passes: int) -> Plan:
    """Takes what a step of the current plan gave, and returns the plan for the next one.

    Args:
      tokens: committed in all rows.
      passes: that rows took part in, all together.
    """
    if passes:
      there = self.current.tokens - 1
      if there > 0:
        here = max(tokens / passes - 1, 0.0) / there
        self.skill += self._NEWEST * (min(here, 2.0) - self.skill)
      else:
        self.skill += self._FORGET * (1.0 - self.skill)
    best = max(self.plans, key=self._rate)
    if self._rate(best) > self._BETTER * self._rate(self.current):
      self.current = best
    return self.current

  def _rate(self, plan: Plan) -> float:
    return (1 + (plan.tokens - 1) * self.skill) / plan.milliseconds


def chosen(measured: Mapping[int, Sequence[Plan]], rows: int) -> tuple[Plan, ...] | None:
  """The plans measured for the least number of rows that is not below `rows`; None: none was.

  More rows never take less time, so these are safe for fewer.
  """
  enough = [count for count in measured if count >= rows]
  return tuple(measured[min(enough)]) if enough else None


def read(directory: Path) -> dict[str, dict[int, tuple[Plan, ...]]]:
  """Device kind -> rows -> plans, of a model's directory; empty where none were measured.

  Raises:
    UserError: the file is there and cannot be understood.
  """
  path = directory / NAME
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {
      device: {int(rows): tuple(_plan(entry) for entry in plans) for rows, plans in table.items()}
      for device, table in found.items()
    }
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f"{path} is no table of drafts ({error}); remove it, or run refine_jax.tune again."
    ) from error


def _plan(entry: dict) -> Plan:
  draft, block, budget = entry["draft"], entry["block"], entry["budget"]
  milliseconds, tokens = float(entry["milliseconds"]), float(entry["tokens"])
  whole = type(block) is int and type(budget) is int and 1 <= block <= 2**12
  if draft not in KINDS or not whole or not 0 <= budget <= 2**16:
    raise ValueError(f"no plan: {entry}")
  if not (0 < milliseconds < 1e6 and 1 <= tokens < 1e4):
    raise ValueError(f"no times: {entry}")
  return Plan(draft, block, budget, milliseconds, tokens)
