"""Names of the leaves of nested dicts."""

import jax


def leaf_name(path: tuple) -> str:
  """'layers/mlp/up/kernel' for a key path of jax.tree_util."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
