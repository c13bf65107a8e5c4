"""A checksum of every array of a tree, to tell silent damage to a checkpoint's data."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.tree import leaf_name


def checksums(tree: Any) -> dict:
  """{leaf's name: [dtype, sum of the array's words modulo 2^32]}, as JSON holds it.

  A sum of integers is the same in any order, so it does not depend on how an array is sharded.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  sums = jax.device_get([_sum_words(x) for _, x in leaves])
  return {
    leaf_name(path): [str(x.dtype), int(total)]
    for (path, x), total in zip(leaves, sums, strict=True)
  }


def fingerprint(tree: Any) -> str:
  """Sixteen hexadecimal digits that tell one set of arrays from another: names, dtypes, values."""
  text = json.dumps(checksums(tree), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def verify(tree: Any, saved: dict) -> None:
  """Compares with what `checksums` gave when the tree was saved.

  Raises:
    ValueError: names an array that is not what was saved.
  """
  for name, (dtype, checksum) in checksums(tree).items():
    saved_dtype, saved_checksum = saved[name]
    # An array that was restored in another dtype has other words.
    if dtype == saved_dtype and checksum != saved_checksum:
      raise ValueError(f"{name} is not what was saved")


@jax.jit
def _sum_words(x):
  words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  return jnp.sum(words, dtype=jnp.uint32)
