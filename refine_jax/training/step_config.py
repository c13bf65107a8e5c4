"""What a step does, apart from how it is computed."""

import dataclasses

from refine_jax.config import NoiseConfig, ObjectiveConfig, OptimConfig
from refine_jax.objective import plan as plan_lib
from refine_jax.objective.draft_gradients import DRAFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """Static choices.

  Attributes:
    noise_token: the id that replaces a token.
    eos_token: the id that ends a response.
    gated: whether what is trained is a gated adapter, on draft blocks (objective.draft_blocks).
    most_tiles: blocks that tile the responses of the row with the most of them; None: not known.
  """

  objective: ObjectiveConfig
  noise: NoiseConfig
  optim: OptimConfig
  noise_token: int
  eos_token: int
  total_steps: int
  seed: int
  gated: bool = False
  most_tiles: int | None = None

  @property
  def plan(self) -> plan_lib.Plan:
    """The terms of the loss."""
    if self.gated:
      return (plan_lib.LossTerm(DRAFT, 1.0, True),)
    return plan_lib.plan(self.objective, self.noise)
