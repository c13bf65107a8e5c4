"""What a layer's backward pass finds saved, and what it recomputes."""

import logging
from collections.abc import Callable

import jax

# From the one that saves all and recomputes nothing to the one that recomputes all.
POLICIES = ("none", "save_attention_mlp", "save_attention", "full")
# Older names, by the last thing saved; they read as if they named what is recomputed.
ALIASES = {"mlp": "save_attention_mlp", "attention": "save_attention"}
_ATTENTION = ("query", "key", "value", "attention", "ranged_attention")
_SAVED_NAMES = {
  # A joined product of gate and up is saved whole: its halves would be copies.
  "save_attention_mlp": (*_ATTENTION, "gate", "up", "gate_up"),
  "save_attention": _ATTENTION,
}


def resolve(name: str) -> str:
  """Returns today's name of a policy, with a warning for an older one."""
  if name not in ALIASES:
    return name
  logging.warning("remat %r is called %r now.", name, ALIASES[name])
  return ALIASES[name]


def policy(name: str) -> Callable[..., bool]:
  """Gives the `jax.checkpoint` policy of what a layer's backward pass finds saved.

  "save_attention_mlp" recomputes norms, rotations and the product of gate and up, "save_attention"
  also gate and up. Attention itself is recomputed only by "full": a flash kernel's log-sum-exp has
  no name to save it by, so its primitive's outputs are kept as such.
  """
  if name == "full":
    return jax.checkpoint_policies.nothing_saveable
  by_name = jax.checkpoint_policies.save_only_these_names(*_SAVED_NAMES[name])

  def saved(primitive, *args, **params):
    return "dot_product_attention_fwd" in primitive.name or by_name(primitive, *args, **params)

  return saved
