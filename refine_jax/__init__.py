"""Trains causal language models to decode in parallel, and samples from them.

Importing this is cheap: what is named here is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `_WHERE` is what runs
  from refine_jax.decoding.comparison import compare_with_ar
  from refine_jax.decoding.generation import Stream, generate, iterative_generate, stream
  from refine_jax.decoding.loading import Model, load
  from refine_jax.decoding.result import Generation
  from refine_jax.errors import UserError

__all__ = [
  "Generation",
  "Model",
  "Stream",
  "UserError",
  "__version__",
  "compare_with_ar",
  "generate",
  "iterative_generate",
  "load",
  "stream",
]
__version__ = "0.1.0"

_WHERE = {
  "Generation": "decoding.result",
  "Model": "decoding.loading",
  "Stream": "decoding.generation",
  "UserError": "errors",
  "compare_with_ar": "decoding.comparison",
  "generate": "decoding.generation",
  "iterative_generate": "decoding.generation",
  "load": "decoding.loading",
  "stream": "decoding.generation",
}


def __getattr__(name: str) -> Any:
  if name not in _WHERE:
    raise AttributeError(f"module 'refine_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"refine_jax.{_WHERE[name]}"), name)
