"""Which drafts pay for how many rows: what `draft="auto"` chooses from, and how it chooses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from refine_jax.errors import UserError

# Beside a model's config.json.
NAME = "draft_plans.json"
# "ar" or a draft kind of "exact" that plans may name.
KINDS = ("ar", "tail", "branches", "budget", "cycle")


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


def within(plan: Plan, block: int) -> Plan:
  """The plan with blocks of at most so many tokens, which take no longer."""
  if plan.block <= block:
    return plan
  budget = min(plan.budget, block) if plan.draft == "cycle" else plan.budget
  tokens = min(plan.tokens, block)
  return plan._replace(block=block, budget=budget, tokens=tokens)


class Chooser:
  """Keeps the plan with most tokens a second, by the table and by what passes then show.

  The table's tokens a pass are those of other text; the ratio of drafts accepted here to drafts
  accepted there is taken for the same in all plans. While "ar" runs nothing is learned of it, and
  it slowly goes back to the table's: each time that drafts then do not pay after all, half as fast.

  Attributes:
    skill: that ratio.
  """

  # How much of the newest steps counts, how much better another plan must be, and how soon "ar"
  # tries again, at first and at least.
  _NEWEST, _BETTER, _FORGET, _LEAST = 0.3, 1.05, 0.005, 0.0003

  def __init__(self, plans: Sequence[Plan]) -> None:
    self.plans = list(plans)
    self.skill = 1.0
    self.current = max(self.plans, key=lambda plan: plan.rate)
    self._forget = self._FORGET

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
        self.skill += self._forget * (1.0 - self.skill)
    best = max(self.plans, key=self._rate)
    if self._rate(best) > self._BETTER * self._rate(self.current):
      if best.tokens <= 1:
        self._forget = max(self._forget / 2, self._LEAST)
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
