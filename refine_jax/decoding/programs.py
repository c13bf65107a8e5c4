"""The one table of compiled programs, by what they were compiled for."""

import collections
import concurrent.futures
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from refine_jax import target
from refine_jax.model.config import ModelConfig

# Each keeps memory maps, of which a process may have 65,530; a program has about 160.
MOST_PROGRAMS = 64
# Rows of a product from which on arithmetic takes the time, not memory (H100).
_MANY_ROWS = 256
# Seconds after which a user is told what they wait for.
_PATIENCE = 2.0
_PROGRAMS: collections.OrderedDict = collections.OrderedDict()  # the one used last at the end


class Job(NamedTuple):
  """A program to be compiled.

  Attributes:
    function: jitted.
    arguments: a tuple of trees of arrays. Every look-up goes over every array, which takes time
      where there are hundreds.
    options: compiler options of XLA; equal shapes must come with equal ones.
    what: a name for it, where its making is to be told on standard error when it takes long.
  """

  function: Any
  arguments: tuple
  options: dict | None = None
  what: str = ""


def compiled(*jobs: Job) -> tuple[list, int, float]:
  """Compiles what is not in the table, side by side.

  Returns:
    the executables, how many of them are new, and the seconds that making these took.
  """
  start = time.perf_counter()
  keys = [_key(job) for job in jobs]
  new = {k: job for k, job in zip(keys, jobs, strict=True) if k not in _PROGRAMS}
  found = {k: _PROGRAMS[k] for k in keys if k in _PROGRAMS}

  def make(job, lowered):
    with _told(job.what) if job.what else contextlib.nullcontext():
      return lowered.compile(compiler_options=job.options)

  with concurrent.futures.ThreadPoolExecutor(max(len(new), 1)) as pool:
    # Traced here, as jax's settings may be this thread's own; XLA does without them, and the lock,
    # so one program is compiled, or read from the cache, while the next is traced.
    made = {k: pool.submit(make, job, job.function.lower(*job.arguments)) for k, job in new.items()}
    found |= {k: program.result() for k, program in made.items()}
  for key, program in found.items():
    _PROGRAMS[key] = program
    _PROGRAMS.move_to_end(key)
  while len(_PROGRAMS) > MOST_PROGRAMS:
    _PROGRAMS.popitem(last=False)
  return [found[k] for k in keys], len(new), time.perf_counter() - start if new else 0.0


def _key(job: Job) -> tuple:
  leaves, structure = jax.tree.flatten(job.arguments)
  shapes = tuple((x.shape, x.dtype) for x in leaves)
  # numpy's arrays have none, and go where the program wants them.
  shardings = frozenset(x.sharding for x in leaves if hasattr(x, "sharding"))
  return job.function, structure, shapes, shardings, context()


def context() -> tuple:
  """What jax.config may change of a program between two calls."""
  config: Any = jax.config
  return config.jax_default_matmul_precision, config.jax_default_device


@functools.lru_cache(MOST_PROGRAMS)
def jitted(function: Callable, config: ModelConfig, settings: Any, sharding: Any) -> Any:
  """The jitted function of (params, state, ..) for a model's shape; it takes the state over.

  Args:
    settings: Settings, static.
    sharding: of all that it gives.
  """
  bound = functools.partial(function, config=config, settings=settings)
  return jax.jit(bound, donate_argnums=1, out_shardings=sharding)


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
  own = target.platform() != "gpu" or tokens < _MANY_ROWS
  return {} if own else {"xla_gpu_enable_triton_gemm": False}


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
  """Says on standard error what is compiled, where that takes longer than a user's patience."""

  def tell():
    print(f"compiling the program for {what} ..", file=sys.stderr, flush=True)

  timer = threading.Timer(_PATIENCE, tell)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
