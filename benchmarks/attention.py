"""Attention engines on packed rows, forward and backward, with their error.

python -m benchmarks.attention --shape=1.5b
"""

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.attention")

from benchmarks import timing
from benchmarks.step import random_batch
from refine_jax.attention import packed as packed_attention


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--engines", help="default: all of the platform")
  arguments = parser.parse_args(argv)
  by_platform = {"gpu": "xla,cudnn_packed,cudnn", "tpu": "xla,splash"}
  engines = arguments.engines or by_platform.get(jax.default_backend(), "xla")
  shape = timing.SHAPES[arguments.shape]
  ceiling = timing.ceiling(arguments.shape, arguments.repeats)
  rows = [_measure(shape, engine, ceiling, arguments.repeats) for engine in engines.split(",")]
  c = shape.model
  summary = {
    "shape": f"{shape.rows} x {shape.length}, {c.heads} heads, {c.kv_heads} key heads",
    "device": jax.local_devices()[0].device_kind,
    "tokens": shape.rows * shape.length,
    "matmul_ceiling_tflops": ceiling / 1e12,
  }
  return timing.report(rows, summary, arguments.json)


def forward_flops(model, segment_ids_BT) -> int:
  """Scores and values over each example's causal half, by the exact lengths."""
  total = 0
  for row in np.asarray(segment_ids_BT):
    lengths = np.unique(row, return_counts=True)[1]
    # A token meets itself and those before it.
    total += int(np.sum(lengths * (lengths + 1) // 2))
  return total * 4 * model.heads * model.head_dim


def _measure(shape, engine, ceiling, repeats) -> dict:
  c, packed = shape.model, engine != "cudnn"
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (c.heads, c.kv_heads, c.kv_heads, c.heads)
  q, k, v, weight = (
    jax.random.normal(key, (shape.rows, shape.length, n, c.head_dim), timing.default_dtype())
    for key, n in zip(keys, heads, strict=True)
  )
  segment_ids = jnp.asarray(random_batch(shape, packed=packed, prompt=1).segment_ids[0])
  segments = shape.segments if packed else 1

  def forward(q, k, v, ids):
    attend = packed_attention.attend_with(ids, backend=engine, max_segments=segments)(None)
    return attend(q, k, v, None)[0]

  def loss(q, k, v, ids, weight):
    return jnp.sum((forward(q, k, v, ids) * weight).astype(jnp.float32))

  inputs = (q, k, v, segment_ids)
  gradient = jax.grad(loss, argnums=(0, 1, 2))
  run_forward, forward_compile = timing.compile_timed(forward, *inputs)
  run_both, both_compile = timing.compile_timed(gradient, *inputs, weight)
  seconds = timing.median_seconds(lambda: run_forward(*inputs), repeats)
  both = timing.median_seconds(lambda: run_both(*inputs, weight), repeats)
  flops = forward_flops(c, segment_ids)
  return {
    "engine": engine,
    "examples_a_row": segments,
    "forward_ms": seconds * 1e3,
    "forward_backward_ms": both * 1e3,
    "floor_forward_ms": flops / ceiling * 1e3,
    # The backward pass: gradients of queries, keys, values and scores; scores made again.
    "floor_forward_backward_ms": 3.5 * flops / ceiling * 1e3,
    "flops": flops,
    "tokens_per_second": shape.rows * shape.length / both,
    "error": _error(run_forward(*inputs), *inputs),
    "compile_seconds": forward_compile + both_compile,
    "peak_gib": timing.peak_gibibytes(),
    **timing.memory(run_both),
  }


def _error(out, q, k, v, segment_ids):
  """Relative to the reference in float32, on the first row."""
  attend = packed_attention.attend_with(segment_ids[:1], backend="xla")(None)
  want = attend(*(x[:1].astype(jnp.float32) for x in (q, k, v)), None)[0]
  got = out[:1].astype(jnp.float32)
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


if __name__ == "__main__":
  timing.run(main)
