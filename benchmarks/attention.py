"""Attention engines on packed rows, forward and backward, with their error.

    python -m benchmarks.attention --shape=1.5b
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.step import random_batch
from refine_jax import attention


def main():
  parser = timing.parser(__doc__)
  default = "xla" if jax.default_backend() == "cpu" else "xla,cudnn_packed,cudnn"
  parser.add_argument("--engines", default=default)
  arguments = parser.parse_args()
  shape = timing.SHAPES[arguments.shape]
  c = shape.model
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (c.heads, c.kv_heads, c.kv_heads, c.heads)
  q, k, v, weight = (
    jax.random.normal(key, (shape.rows, shape.length, n, c.head_dim), dtype)
    for key, n in zip(keys, heads, strict=True)
  )
  rows = []
  for engine in arguments.engines.split(","):
    packed = engine != "cudnn"
    segment_ids = jnp.asarray(random_batch(shape, packed=packed, prompt=1)["segment_ids"][0])
    segments = shape.segments if packed else 1

    def forward(q, k, v, engine=engine, ids=segment_ids, segments=segments):
      attend = attention.attend_with(ids, backend=engine, max_segments=segments)(None)
      return attend(q, k, v, None)[0]

    def loss(q, k, v, forward=forward):
      return jnp.sum((forward(q, k, v) * weight).astype(jnp.float32))

    run_forward, run_both = jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    rows.append({
      "engine": engine,
      "examples_a_row": segments,
      "forward_ms": timing.median_seconds(
        lambda run=run_forward: run(q, k, v), arguments.repeats) * 1e3,
      "forward_backward_ms": timing.median_seconds(
        lambda run=run_both: run(q, k, v), arguments.repeats) * 1e3,
      "error": _error(run_forward(q, k, v), q, k, v, segment_ids),
    })  # fmt: skip
  # Scores and values over each example's causal half, forward, by the exact lengths.
  lengths = np.unique(np.asarray(segment_ids[0]), return_counts=True)[1]
  flops = shape.rows * sum(4 * c.heads * c.head_dim * n * n / 2 for n in lengths.tolist())
  ceiling = timing.ceiling(arguments.shape, arguments.repeats)
  summary = {
    "shape": f"{shape.rows} x {shape.length}, {c.heads} heads, {c.kv_heads} key heads",
    "device": jax.local_devices()[0].device_kind,
    "floor_forward_ms": flops / ceiling * 1e3,
    "matmul_ceiling_tflops": ceiling / 1e12,
  }
  timing.report(rows, summary, arguments.json)


def _error(out, q, k, v, segment_ids):
  """Relative to the reference in float32, on the first row."""
  attend = attention.attend_with(segment_ids[:1], backend="xla")(None)
  want = attend(*(x[:1].astype(jnp.float32) for x in (q, k, v)), None)[0]
  got = out[:1].astype(jnp.float32)
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


if __name__ == "__main__":
  main()
