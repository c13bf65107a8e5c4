"""Plans for a device that `refine_jax.tune` has not measured: `built_in`.

Tokens a pass are those of the text that was measured, and only their quotients count: what passes
give here corrects them (plans.Chooser).
"""

import bisect

from refine_jax import target
from refine_jax.decoding import plans
from refine_jax.decoding.plans import Plan

_AR = Plan("ar", 1, 0, 1.0, 1.0)
# What decides is the ratio of arithmetic to memory, which these share but for 40 %.
_MEASURED = ("H100", "H200")
# Rows of a pass -> plans, 135M in bfloat16 with an adapter on one H100 (docs/performance.md).
# Without an adapter drafts cost less. Others that were measured are slower than one of these for
# any share of right drafts.
_SMALL = {
  1: (
    Plan("ar", 1, 0, 1.08, 1.0),
    Plan("cycle", 16, 16, 1.25, 6.42),
    Plan("branches", 16, 0, 1.60, 9.49),
  ),
  32: (Plan("ar", 1, 0, 1.15, 1.0), Plan("cycle", 16, 16, 1.83, 6.76)),
  128: (Plan("ar", 1, 0, 1.75, 1.0), Plan("cycle", 16, 16, 4.68, 6.68)),
}
# Parameters of the layers up to which these hold; larger models are bound by memory, not by the
# number of kernels.
_MOST_SMALL = 200_000_000
# A pass of the 1.5b shape in bfloat16 on an H100 over so many tokens of all rows, as a multiple of
# one over one token; between two of them the larger counts, beyond the last none.
_TOKENS = (16, 32, 128, 256, 512, 1024, 2048, 4096, 8192)
_COSTS = (1.0, 1.15, 1.35, 1.62, 2.07, 3.5, 5.9, 11.7, 23.0)
# What an adapter adds to a pass.
_ADAPTED = 1.24
# Tokens a row -> kind, and tokens a pass of a model whose branches of 16 say 6, in proportion to
# those of one that says 10.
_ACCEPTED = {
  8: ("budget", 3.0),
  16: ("cycle", 4.0),
  32: ("budget", 4.8),
  64: ("budget", 5.5),
  128: ("budget", 5.8),
}
# On other accelerators, by bytes of a number: so few tokens of all rows cost little on any.
_SAFE_TOKENS = {2: 64, 4: 32}
# On a CPU a pass takes longer with each token: the quickstart's model on two cores. With more rows
# drafts do not pay for sure.
_CPU = {1: (_AR, Plan("budget", 4, 4, 1.4, 1.96), Plan("budget", 8, 8, 2.2, 2.9))}
# Models trained without blocks keep the last pass's predictions: tokens a block, and a pass.
_TAIL = (8, 1.87)


def built_in(
  rows: int, block: int, *, adapted: bool, parameters: int, itemsize: int, trained: bool = True
) -> tuple[Plan, ...]:
  """Plans for `rows` rows of a pass on this device, "ar" the first of them.

  Args:
    block: the most tokens that a pass may commit; 1: "ar" alone.
    adapted: whether drafts need an adapter.
    parameters, itemsize: of the model's layers: how many, and bytes of each.
    trained: whether with blocks, so that runs of noise say something.
  """
  if target.platform() == "cpu":
    found = (trained and plans.chosen(_CPU, rows)) or (_AR,)
  else:
    measured = itemsize == 2 and any(name in target.kind() for name in _MEASURED)
    small = measured and trained and parameters <= _MOST_SMALL
    most = _TOKENS[-1] if measured else _SAFE_TOKENS.get(itemsize, 0)
    found = (small and plans.chosen(_SMALL, rows)) or _by_tokens(
      rows, most, adapted=adapted, trained=trained
    )
  return tuple(plans.within(plan, block) for plan in found if block > 1 or plan.draft == "ar")


def _by_tokens(rows: int, most: int, *, adapted: bool, trained: bool) -> tuple[Plan, ...]:
  """Plans whose passes have at most so many tokens of all rows, by what those of the 1.5b cost."""
  found = [Plan("ar", 1, 0, _cost(rows), 1.0)]
  if not trained:
    size, tokens = _TAIL
    if rows * size <= most:
      found.append(Plan("tail", size, 0, _cost(rows * size), tokens))
    return tuple(found)
  for budget, (draft, tokens) in _ACCEPTED.items():
    if rows * budget <= most:
      cost = _cost(rows * budget) * (_ADAPTED if adapted else 1.0)
      found.append(Plan(draft, budget, budget, cost, tokens))
  return tuple(found)


def _cost(tokens: int) -> float:
  return _COSTS[min(bisect.bisect_left(_TOKENS, tokens), len(_COSTS) - 1)]
