"""Measures how often drafts are right, by their probability, and fits the curves to it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from refine_jax.decoding import generation
from refine_jax.decoding.loading import Model
from refine_jax.decoding.result import Pass
from refine_jax.errors import UserError
from refine_jax.hf import calibration as curves
from refine_jax.hf.calibration import Calibration, Curve

_NEW_TOKENS = 256


class Drafts(NamedTuple):
  """Drafts whose predecessors were right, by their offset in their run.

  Attributes:
    probability: for each offset float [n].
    right: for each offset bool [n].
  """

  probability: list[np.ndarray]
  right: list[np.ndarray]


class Report(NamedTuple):
  """What a calibration gives.

  Attributes:
    calibration: fitted on all problems.
    before, after: for greedy rows and rows at temperature 1, and each offset, the expected
      calibration error of the probability itself, and of a curve fitted on the other half of the
      problems.
    counts: drafts at each offset.
  """

  calibration: Calibration
  before: dict[str, list[float]]
  after: dict[str, list[float]]
  counts: dict[str, list[int]]


def calibrate(model: Model, prompts: Sequence, new: int = _NEW_TOKENS, slots: int = 0) -> Report:
  """Answers prompts greedily and at temperature 1, and looks at every draft that was verified.

  Args:
    prompts: as `generate` takes them; half of them serve to check the other half's curve.
    new: tokens of each answer, at most.

  Raises:
    UserError: the model was not trained with blocks, or there are fewer than two prompts.
  """
  trained = model.refinement
  if not (trained and trained.block_size and trained.block_size > 1):
    raise UserError(
      f"{model.directory} was not trained with blocks, so its drafts have no runs to calibrate."
    )
  if len(prompts) < 2:
    raise UserError("A calibration needs two prompts at least; give more of --data.")
  fitted: dict[str, Curve] = {}
  before, after, counts = {}, {}, {}
  for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
    out = generation.generate(
      model,
      prompts,
      draft="branches",
      block_size=trained.block_size,
      max_new_tokens=new,
      temperature=temperature,
      trace=True,
      slots=min(slots, len(prompts)),
    )
    assert out.trace is not None
    halves = [drafts_of(out.trace.rows[i::2], trained.block_size - 1) for i in range(2)]
    both = Drafts(*(_joined(*parts) for parts in zip(*halves, strict=True)))
    fitted[name] = curves.fit(*both)
    counts[name] = [len(right) for right in both.right]
    before[name] = errors(Curve(), both)
    crossed = [
      _chances(curves.fit(*other), mine) for mine, other in zip(halves, halves[::-1], strict=True)
    ]
    after[name] = [
      curves.calibration_error(chance, right)
      for chance, right in zip(_joined(*crossed), both.right, strict=True)
    ]
  return Report(Calibration(**fitted), before, after, counts)


def drafts_of(rows: Iterable[list[Pass]], most: int) -> Drafts:
  """The drafts of traces of "branches" in "exact", at offsets below `most`."""
  probability: list[list[float]] = [[] for _ in range(most)]
  right: list[list[bool]] = [[] for _ in range(most)]
  for row in rows:
    for i in range(len(row) - 1):
      offered, verified = row[i], row[i + 1].committed - 1
      # What ends an answer is not a wrong draft.
      known = verified if i + 2 == len(row) else verified + 1
      found = offered.probabilities[offered.committed :][: min(known, most)]
      for offset, p in enumerate(found):
        probability[offset].append(p)
        right[offset].append(offset < verified)
  return Drafts([np.array(x, np.float64) for x in probability], [np.array(x, bool) for x in right])


def errors(curve: Curve, drafts: Drafts) -> list[float]:
  """The expected calibration error at each offset."""
  pairs = zip(_chances(curve, drafts), drafts.right, strict=True)
  return [curves.calibration_error(chance, right) for chance, right in pairs]


def _chances(curve: Curve, drafts: Drafts) -> list[np.ndarray]:
  result = []
  for offset, p in enumerate(drafts.probability):
    row = np.zeros((len(p), offset + 1))
    row[:, offset] = p
    result.append(np.asarray(curves.chances(curve, row))[:, offset] if len(p) else p)
  return result


def _joined(*parts: list[np.ndarray]) -> list[np.ndarray]:
  return [np.concatenate(pair) for pair in zip(*parts, strict=True)]
