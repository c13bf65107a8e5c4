"""What a run trains for, by name: --config=configs/smollm2_tasks.py:blocks."""

from ml_collections import ConfigDict

from refine_jax.config.key import nearest, warn
from refine_jax.errors import UserError

MEANINGS = {
  "uniform": "the method as first described: rates uniform in [0.1, 0.9], two rounds",
  "blocks": "drafts as the sampler shows them, next to the next-token loss that keeps accuracy",
  "gated": "drafts by an adapter on a frozen base, whose text stays the base's own",
  "ar_sft": "plain next-token fine-tuning, what the others are compared with",
}
_ALIASES = {"document": "uniform"}


def canonical(name: str) -> str:
  """Today's name of a recipe; an older one is said on stderr.

  Raises:
    UserError: no such recipe.
  """
  if name in _ALIASES:
    warn(f"recipe {name!r} is called {_ALIASES[name]!r} now.")
    return _ALIASES[name]
  if name not in MEANINGS:
    raise UserError(
      f"recipe {name!r} is not known; it is one of {', '.join(MEANINGS)}.{nearest(name, MEANINGS)}"
    )
  return name


def apply(config: ConfigDict, name: str) -> ConfigDict:
  """Sets objective and noise as the recipe has them; the rest of the config stays.

  Args:
    name: one of MEANINGS; "uniform" is what the defaults are.

  Raises:
    UserError: no such recipe.
  """
  name = canonical(name)
  if name == "ar_sft":
    # One round without noise is the next-token loss.
    config.objective.num_iterations = 1
    config.objective.loss_weights = (1.0,)
    config.noise.noise_min = config.noise.noise_max = 0.0
  elif name == "blocks":
    config.noise.kind = "block"
    config.noise.block_size = 16
    config.noise.offset_decay = 0.85
    # More weight on drafts costs accuracy (docs/results.md). The sampler's branches show a block
    # once, so a second round would train what they never see.
    config.objective.clean_weight = 1.0
    config.objective.num_iterations = 1
    config.objective.loss_weights = (0.1,)
  elif name == "gated":
    config.adapter.kind = "gated"
    config.noise.kind = "block"
    config.noise.block_size = 16
    config.noise.offset_decay = 0.85
    config.objective.num_iterations = 1
    config.objective.loss_weights = (1.0,)
    config.optim.lr = 5e-4
  return config
