"""The output head with cross-entropy and greedy prediction, forward and backward.

    python -m benchmarks.head --shape=1.5b
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks import timing
from refine_jax.head import cross_entropy


def main():
  parser = timing.parser(__doc__)
  parser.add_argument("--chunks", default="1024,2048,4096,8192")
  arguments = parser.parse_args()
  shape = timing.SHAPES[arguments.shape]
  tokens, width, vocabulary = (
    shape.rows * shape.length, shape.model.width, shape.model.vocab_size
  )  # fmt: skip
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (tokens, width), dtype)
  head = jax.random.normal(keys[1], (vocabulary, width)) * 0.02
  targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
  weights = jnp.full((tokens,), 1.0 / tokens)
  product_flops = 2 * tokens * width * vocabulary
  rows = []
  for chunk in map(int, arguments.chunks.split(",")):
    for gradient in ("forward", "recompute"):
      loss = functools.partial(cross_entropy, chunk=chunk, gradient=gradient)
      step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
      compiled = step.lower(x, head, targets, weights).compile()
      seconds = timing.median_seconds(
        lambda run=compiled: run(x, head, targets, weights), arguments.repeats
      )
      rows.append({
        "chunk": chunk,
        "gradient": gradient,
        "ms": seconds * 1e3,
        "tflops_per_second": 3 * product_flops / seconds / 1e12,
        "temp_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
      })
  ceiling = timing.ceiling(arguments.shape, arguments.repeats)
  summary = {
    "shape": f"{tokens} tokens, width {width}, vocabulary {vocabulary}",
    "device": jax.local_devices()[0].device_kind,
    "floor_ms": 3 * product_flops / ceiling * 1e3,
    "matmul_ceiling_tflops": ceiling / 1e12,
  }
  timing.report(rows, summary, arguments.json)


if __name__ == "__main__":
  main()
