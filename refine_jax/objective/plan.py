"""The loss of a run as a list of terms, which the step, FLOPs and metrics read."""

from typing import NamedTuple

from refine_jax.config import NoiseConfig, ObjectiveConfig
from refine_jax.objective import noise as noise_lib

CLEAN = "clean"


class LossTerm(NamedTuple):
  """One term of the total loss: weight * mean cross-entropy over the tokens that it scores.

  Attributes:
    name: "clean", the next-token loss on the clean text; or "s0", "s1", .., the rounds in order.
    own_pass: whether the term costs a pass through the model; without one it takes part in the
      pass of the term after it.
  """

  name: str
  weight: float
  own_pass: bool


Plan = tuple[LossTerm, ...]


def plan(objective: ObjectiveConfig, noise: NoiseConfig) -> Plan:
  """The terms in the order of their passes; a round of weight 0 stays, for the one after it."""
  inside = noise_lib.from_config(noise).clean_text_inside
  return of_weights(objective.loss_weights, objective.clean_weight, clean_text_inside=inside)


def of_weights(
  loss_weights: tuple[float, ...], clean_weight: float = 0.0, *, clean_text_inside: bool = False
) -> Plan:
  """`plan` from bare numbers: one weight for each round, and one for the clean text (0: none)."""
  clean = (LossTerm(CLEAN, clean_weight, not clean_text_inside),) if clean_weight > 0 else ()
  return clean + tuple(LossTerm(f"s{i}", w, True) for i, w in enumerate(loss_weights))


def rounds(terms: Plan) -> Plan:
  """The terms that are rounds."""
  return tuple(term for term in terms if term.name != CLEAN)


def others(terms: Plan) -> Plan:
  """The terms that are no rounds."""
  return tuple(term for term in terms if term.name == CLEAN)


def passes(terms: Plan) -> int:
  """Counts the passes through the model in one step, over each micro-batch."""
  return sum(term.own_pass for term in terms)
