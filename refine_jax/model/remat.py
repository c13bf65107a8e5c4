"""What a layer's backward pass finds saved, and what it recomputes."""

import jax

POLICIES = ("none", "mlp", "attention", "full")
_SAVED_NAMES = {
  # A joined product of gate and up is saved whole: its halves would be copies.
  "mlp": ("query", "key", "value", "attention", "gate", "up", "gate_up"),
  "attention": ("query", "key", "value", "attention"),
}


def policy(name: str):
  """What a layer's backward pass finds saved: a `jax.checkpoint` policy.

  "mlp" recomputes norms, rotations and the product of gate and up; "attention" also gate and
  up. Attention itself is recomputed only by "full": a flash kernel's log-sum-exp has no name to
  save it by, so its primitive's outputs are kept as such.
  """
  if name == "full":
    return jax.checkpoint_policies.nothing_saveable
  by_name = jax.checkpoint_policies.save_only_these_names(*_SAVED_NAMES[name])

  def saved(primitive, *args, **params):
    return "dot_product_attention_fwd" in primitive.name or by_name(primitive, *args, **params)

  return saved
