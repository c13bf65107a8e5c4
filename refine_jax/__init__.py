"""Trains causal language models to decode in parallel, and samples from them.

Importing this is cheap: what is named here is loaded when it is first used.
"""

import importlib

_WHERE = {
  "Generation": "decoding.result",
  "Model": "decoding.loading",
  "Stream": "decoding.generation",
  "UserError": "errors",
  "compare_with_ar": "decoding.comparison",
  "generate": "decoding.generation",
  "iterative_generate": "decoding.generation",
  "load": "decoding.loading",
}
__all__ = list(_WHERE)


def __getattr__(name):
  if name not in _WHERE:
    raise AttributeError(f"module 'refine_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"refine_jax.{_WHERE[name]}"), name)
