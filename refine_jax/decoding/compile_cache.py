"""Compiled programs for bucketed shapes, with the seconds that making and running them took."""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax

# Each keeps memory maps, of which a process may have 65,530; a program has about 160.
MOST_PROGRAMS = 64
# Rows of a product from which on arithmetic takes the time, not memory (H100).
_MANY_ROWS = 256
_PROGRAMS: collections.OrderedDict = collections.OrderedDict()  # the one used last at the end


def compiled(
  function: Any, arguments: tuple, options: dict | None = None, **static: Any
) -> tuple[Any, float]:
  """The executable for these shapes and devices, and the seconds that making it took.

  Args:
    function: jitted.
    arguments: a tuple of trees of arrays. Every call looks at every array, which takes time where
      there are hundreds.
    options: compiler options of XLA; equal shapes must come with equal ones.
    static: static arguments of the function.
  """
  leaves, structure = jax.tree.flatten(arguments)
  shapes = tuple((x.shape, x.dtype) for x in leaves)
  # numpy's arrays have none, and go where the program wants them.
  shardings = frozenset(x.sharding for x in leaves if hasattr(x, "sharding"))
  # What jax.config may change between two calls.
  config: Any = jax.config
  context = (config.jax_default_matmul_precision, config.jax_default_device)
  key = (function, structure, shapes, shardings, context, tuple(static.items()))
  if key in _PROGRAMS:
    _PROGRAMS.move_to_end(key)
    return _PROGRAMS[key], 0.0
  start = time.perf_counter()
  program = function.lower(*arguments, **static).compile(compiler_options=options)
  _PROGRAMS[key] = program
  while len(_PROGRAMS) > MOST_PROGRAMS:
    _PROGRAMS.popitem(last=False)
  return program, time.perf_counter() - start


def timed(function: Callable, *arguments: Any) -> tuple[Any, float]:
  """The function's result, computed, and the seconds that it took."""
  start = time.perf_counter()
  result = jax.block_until_ready(function(*arguments))
  return result, time.perf_counter() - start


def bucket(size: int, smallest: int) -> int:
  """The next power of two: few programs serve all sizes."""
  return max(smallest, 1 << (size - 1).bit_length())


def compiler_options(tokens: int) -> dict:
  """Options of XLA for a program whose products have so many rows.

  Where arithmetic is what takes the time, cuBLAS is faster than XLA's own kernels, and adds biases
  and the residual stream on the way; where memory is, it is slower.
  """
  own = jax.default_backend() != "gpu" or tokens < _MANY_ROWS
  return {} if own else {"xla_gpu_enable_triton_gemm": False}
