"""What the benchmarks share: shapes, medians of warm runs, ceilings of the device, output."""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from refine_jax.errors import UserError
from refine_jax.model.rope import RopeConfig
from refine_jax.model.transformer import ModelConfig


@dataclasses.dataclass(frozen=True)
class Shape:
  """A model and a batch of `rows` x `length` tokens, each row holding `segments` examples."""

  model: ModelConfig
  rows: int
  length: int
  segments: int


def _model(**changes) -> ModelConfig:
  base = dict(
    vocab_size=256,
    width=64,
    feed_forward=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope=RopeConfig(),
    tied_head=False,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    max_length=131072,
    initializer_range=0.02,
  )
  base |= changes
  return ModelConfig(windows=(None,) * base["layers"], **base)


# SmolLM2-135M, DeepSeek-R1-Distill-Qwen-1.5B and Llama-3-8B by their config.json.
SHAPES = {
  "tiny": Shape(_model(), rows=2, length=128, segments=4),
  "135m": Shape(
    _model(
      vocab_size=49152,
      width=576,
      feed_forward=1536,
      layers=30,
      heads=9,
      kv_heads=3,
      head_dim=64,
      tied_head=True,
      qkv_bias=False,
    ),
    rows=64,
    length=512,
    segments=4,
  ),
  "1.5b": Shape(
    _model(
      vocab_size=151936,
      width=1536,
      feed_forward=8960,
      layers=28,
      heads=12,
      kv_heads=2,
      head_dim=128,
    ),
    rows=8,
    length=2048,
    segments=4,
  ),
  "8b": Shape(
    _model(
      vocab_size=128256,
      width=4096,
      feed_forward=14336,
      layers=32,
      heads=32,
      kv_heads=8,
      head_dim=128,
      qkv_bias=False,
    ),
    rows=4,
    length=4096,
    segments=4,
  ),
}


def parser(description: str) -> argparse.ArgumentParser:
  result = argparse.ArgumentParser(description=description.splitlines()[0])
  result.add_argument("--shape", choices=SHAPES, default="1.5b")
  result.add_argument("--repeats", type=int, default=7, help="timed runs; the median is reported")
  result.add_argument("--json", action="store_true", help="end with one JSON object on a line")
  return result


def default_dtype() -> str:
  """float32 on a CPU, where bfloat16 is emulated."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def integers(text: str) -> list[int]:
  """A list of an option: "1,32"."""
  return [int(x) for x in text.split(",")]


def median_seconds(function, repeats: int, *, warm: int = 2) -> float:
  """Median time of a call that returns device arrays, after `warm` calls that are not timed."""
  seconds = []
  for i in range(warm + repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    if i >= warm:
      seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def compile_timed(function, *arguments, **static) -> tuple:
  """The executable of a function for these arguments, and the seconds that making it took."""
  start = time.perf_counter()
  program = jax.jit(function).lower(*arguments, **static).compile()
  return program, time.perf_counter() - start


def memory(program) -> dict:
  """Bytes that one compiled program asks for: its own, whatever ran in the process before."""
  analysis = program.memory_analysis()
  return {
    "temp_bytes": analysis.temp_size_in_bytes,
    "argument_bytes": analysis.argument_size_in_bytes,
  }


def matmul_flops_per_second(size: int, repeats: int) -> float:
  """The device's ceiling for bfloat16 products: size^3, on random data."""
  a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
  # Ten in a row, so that dispatch does not count.
  product = jax.jit(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, x: (x @ b) * 0.01, a))
  return 10 * 2 * size**3 / median_seconds(lambda: product(a, b), repeats)


def ceiling(shape: str, repeats: int) -> float:
  return matmul_flops_per_second(256 if shape == "tiny" else 8192, repeats)


def copy_bytes_per_second(shape: str, repeats: int) -> float:
  """The device's ceiling for memory: bytes read and written by a copy of an array."""
  x = jnp.ones((2**20 if shape == "tiny" else 2**28,))
  copy = jax.jit(lambda x: x + 1)

  def run():
    # Ten programs, not a loop in one: that could be merged into a single pass.
    y = x
    for _ in range(10):
      y = copy(y)
    return y

  return 10 * 2 * x.nbytes / median_seconds(run, repeats)


def peak_gibibytes() -> float | None:
  """Most device memory in use since the process started; None where it is not counted."""
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats.get("peak_bytes_in_use")
  return None if peak is None else peak / 2**30


def table(rows: list) -> str:
  """Dicts as aligned columns; a key that a row does not have is left empty in it."""

  def cell(value):
    if isinstance(value, float):
      return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "-" if value is None else str(value)

  names = list(dict.fromkeys(name for row in rows for name in row))
  lines = [names, *([cell(row.get(name)) for name in names] for row in rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
  return "\n".join(
    "  ".join(
      text.rjust(w) if i else text.ljust(w)
      for i, (text, w) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def print_row(row: dict) -> dict:
  """The row, printed at once: what a run had measured is not lost when it is stopped."""
  print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
  sys.stdout.flush()
  return row


def report(rows: list, summary: dict, as_json: bool, **tables: list) -> dict:
  """Prints the tables, the summary, and at the end the JSON object where it is asked for.

  Args:
    tables: further ones, by the name that they have in the object.

  Returns:
    that object.
  """
  result = summary | tables | {"rows": rows}
  print("\n\n".join(map(table, (*tables.values(), rows))) + "\n")
  for name, value in summary.items():
    print(f"{name}: {value}")
  if as_json:
    print(json.dumps(result))
  return result


def run(main):
  """A benchmark as a program: a user's mistake is one line on stderr."""
  try:
    main()
  except UserError as error:
    raise SystemExit(f"error: {error}") from None
