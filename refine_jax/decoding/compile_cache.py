"""Compiled programs for bucketed shapes, with the seconds that making and running them took."""

import time

import jax

_PROGRAMS: dict = {}
_MOST_PROGRAMS = 64


def compiled(function, arguments, options=None, **static):
  """The executable for these shapes and devices, and the seconds that making it took.

  Args:
    arguments: arrays; there are hundreds, and this looks at each one in every call.
    options: XLA's, a function of these shapes.
  """
  leaves, structure = jax.tree.flatten(arguments)
  shapes = tuple((x.shape, x.dtype) for x in leaves)
  # numpy's arrays have none, and go where the program wants them.
  shardings = frozenset(x.sharding for x in leaves if hasattr(x, "sharding"))
  key = (function, structure, shapes, shardings, tuple(static.items()))
  if key in _PROGRAMS:
    return _PROGRAMS[key], 0.0
  start = time.perf_counter()
  program = function.lower(*arguments, **static).compile(compiler_options=options)
  if len(_PROGRAMS) >= _MOST_PROGRAMS:
    _PROGRAMS.pop(next(iter(_PROGRAMS)))
  _PROGRAMS[key] = program
  return program, time.perf_counter() - start


def timed(function, *arguments):
  start = time.perf_counter()
  result = jax.block_until_ready(function(*arguments))
  return result, time.perf_counter() - start


def bucket(size: int, smallest: int) -> int:
  """The next power of two: few programs serve all sizes."""
  return max(smallest, 1 << (size - 1).bit_length())
