"""How sure drafts are, and how sure they may be: what "refinement" keeps of it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from refine_jax.errors import UserError
from refine_jax.quoting import shown

# Probabilities nearer to 0 and 1 say no more than these do.
_LEAST = 1e-5
# The chance of a draft of which nothing is known.
_USUAL = 0.85
# As many drafts as what is known of all offsets counts for at each: few say little by themselves.
_PULL = 10.0
_LISTS = ("temperature", "shift", "accepted")
# Curves are float32.
_MOST = 1e6


@dataclasses.dataclass(frozen=True)
class Curve:
  """From a draft's probability p to the chance that it is right where those before it are.

  The chance is sigmoid(logit(p) / temperature + shift); the last entry serves later offsets.

  Attributes:
    temperature, shift: an entry for each offset of a draft in its run; none: p itself.
    accepted: the share of drafts at this offset that were right where those before them were.
  """

  temperature: tuple[float, ...] = ()
  shift: tuple[float, ...] = ()
  accepted: tuple[float, ...] = (_USUAL,)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """The curves of greedy rows, and of rows with a temperature.

  Attributes:
    sampled: None where it was not measured: then a draft's chance is the share accepted.
  """

  greedy: Curve = Curve()
  sampled: Curve | None = None

  def chance(self, probability_BD: jax.Array, samples_B: jax.Array) -> jax.Array:
    """The drafts' chances, float32 [B, D]."""
    count = probability_BD.shape[1]
    greedy = chances(self.greedy, probability_BD)
    if self.sampled is None:
      sampled = jnp.broadcast_to(_spread(self.greedy.accepted, count)[None, :], greedy.shape)
    else:
      sampled = chances(self.sampled, probability_BD)
    return jnp.where(samples_B[:, None], sampled, greedy)

  def worth(self, count: int) -> jax.Array:
    """The chance that a draft at each offset is accepted: float32 [count], falling."""
    return jnp.asarray(np.cumprod(_spread(self.greedy.accepted, count)), jnp.float32)


PLAIN = Calibration()


def chances(curve: Curve, probability_BD: ArrayLike) -> jax.Array:
  """What a curve makes of probabilities at offsets 0, 1, ..: float32 [B, D]."""
  p = jnp.asarray(probability_BD, jnp.float32)
  if not curve.temperature:
    return p
  count = p.shape[1]
  p = jnp.clip(p, _LEAST, 1 - _LEAST)
  logit = jnp.log(p) - jnp.log1p(-p)
  temperature, shift = (_spread(x, count)[None, :] for x in (curve.temperature, curve.shift))
  return jax.nn.sigmoid(logit / temperature + shift)


def _spread(values: Sequence[float], count: int) -> np.ndarray:
  """The first `count` values, the last one again where they end."""
  return np.asarray([values[min(i, len(values) - 1)] for i in range(count)], np.float32)


def fit(probabilities: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> Curve:
  """The curve of most likelihood: one for all offsets first, and each offset's own near to it.

  Args:
    probabilities: for each offset those of drafts whose predecessors were right, float [n].
    right: bool likewise, whether each was right.
  """
  logits = [_logit(np.asarray(p, np.float64)) for p in probabilities]
  hits = [np.asarray(y, np.float64) for y in right]
  shared = _fit_one(np.concatenate(logits), np.concatenate(hits), np.array([1.0, 0.0]))
  entries = [_fit_one(x, y, shared) for x, y in zip(logits, hits, strict=True)]
  overall = (sum(y.sum() for y in hits) + _USUAL) / (sum(map(len, hits)) + 1)
  accepted = [(y.sum() + _PULL * overall) / (len(y) + _PULL) for y in hits]
  return Curve(
    tuple(round(1 / float(slope), 5) for slope, _ in entries),
    tuple(round(float(shift), 5) for _, shift in entries),
    tuple(round(float(share), 5) for share in accepted),
  )


def _logit(p):
  p = np.clip(p, _LEAST, 1 - _LEAST)
  return np.log(p) - np.log1p(-p)


def _fit_one(logit, right, start):
  """Slope and shift of a logistic regression, by Newton's method, pulled towards `start`."""
  x = np.stack([logit, np.ones_like(logit)], axis=1)
  weights = start.copy()
  for _ in range(50):
    chance = 1 / (1 + np.exp(-x @ weights))
    gradient = x.T @ (right - chance) - _PULL * (weights - start)
    curvature = (x * (chance * (1 - chance))[:, None]).T @ x + _PULL * np.eye(2)
    step = np.linalg.solve(curvature, gradient)
    weights = weights + np.clip(step, -1, 1)
    if np.abs(step).max() < 1e-9:
      break
  # A temperature is positive: where the surer drafts are less often right, all are the same.
  return np.array([max(weights[0], 1e-2), weights[1]])


def calibration_error(chance: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
  """Expected calibration error (Guo et al. 2017, arXiv:1706.04599), in bins of equal counts."""
  if not len(chance):
    return 0.0
  order = np.argsort(chance, kind="stable")
  groups = np.array_split(order, min(bins, len(chance)))
  gaps = [len(g) * abs(chance[g].mean() - right[g].mean()) for g in groups]
  return float(sum(gaps) / len(chance))


def read(values: object, where: str) -> Calibration | None:
  """From the JSON of "refinement"; keys of a later version are left alone.

  Raises:
    UserError: a list is missing, or holds something that is no number.
  """
  if values is None:
    return None
  curves = {}
  for name in ("greedy", "sampled"):
    part = values.get(name) if isinstance(values, dict) else None
    if part is None and name == "sampled" and isinstance(values, dict):
      continue
    lists = [_numbers(part.get(key)) for key in _LISTS] if isinstance(part, dict) else []
    lengths = {len(entries) for entries in lists}
    good = len(lengths) == 1 and lengths != {0}
    if not good or min(lists[0]) <= 0 or not all(0 <= share <= 1 for share in lists[2]):
      raise UserError(
        f"{where}.{name}={shown(part)} must be an object of lists of numbers ({', '.join(_LISTS)})"
        " of one length, temperatures above 0, shares accepted from 0 to 1; calibrate the model"
        " again, or remove it."
      )
    curves[name] = Curve(*lists)
  return Calibration(**curves)


def _numbers(values: object) -> tuple[float, ...]:
  """A list's numbers; none where it is no list, or holds something else."""
  entries: list = values if isinstance(values, list) else []
  good = all(type(x) in (int, float) and abs(x) <= _MOST for x in entries)
  return tuple(map(float, entries)) if good else ()


def describe(calibration: Calibration) -> dict:
  """The JSON of it."""
  named = {"greedy": calibration.greedy, "sampled": calibration.sampled}
  return {
    name: {key: list(getattr(curve, key)) for key in _LISTS}
    for name, curve in named.items()
    if curve is not None
  }
