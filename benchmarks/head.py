"""The output head with cross-entropy and greedy prediction, forward and backward.

python -m benchmarks.head --shape=1.5b
"""

import functools

import jax
import jax.numpy as jnp

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.head")

from benchmarks import timing
from refine_jax.model.head import cross_entropy


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--chunks", default="1024,2048,4096,8192", type=timing.integers)
  arguments = parser.parse_args(argv)
  shape = timing.SHAPES[arguments.shape]
  tokens, width, vocabulary = (shape.rows * shape.length, shape.model.width, shape.model.vocab_size)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (tokens, width), timing.default_dtype())
  head = jax.random.normal(keys[1], (vocabulary, width)) * 0.02
  targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
  weights = jnp.full((tokens,), 1.0 / tokens)
  # Logits, and the gradients of hidden states and head: recomputed logits do not count.
  flops = 3 * 2 * tokens * width * vocabulary
  ceiling = timing.ceiling(arguments.shape, arguments.repeats)
  rows = []
  for chunk in arguments.chunks:
    for gradient in ("forward", "recompute"):
      loss = functools.partial(cross_entropy, chunk=chunk, gradient=gradient)
      step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
      run, compile_seconds = timing.compile_timed(step, x, head, targets, weights)
      seconds = timing.median_seconds(
        lambda run=run: run(x, head, targets, weights), arguments.repeats
      )
      rows.append(
        {
          "chunk": chunk,
          "gradient": gradient,
          "ms": seconds * 1e3,
          "tokens_per_second": tokens / seconds,
          "tflops_per_second": flops / seconds / 1e12,
          "share_of_ceiling": flops / seconds / ceiling,
          "compile_seconds": compile_seconds,
          "peak_gib": timing.peak_gibibytes(),
          **timing.memory(run),
        }
      )
  summary = {
    "shape": f"{tokens} tokens, width {width}, vocabulary {vocabulary}",
    "device": jax.local_devices()[0].device_kind,
    "tokens": tokens,
    "flops": flops,
    "matmul_ceiling_tflops": ceiling / 1e12,
    "floor_ms": flops / ceiling * 1e3,
    "best_ms": min(row["ms"] for row in rows),
  }
  return timing.report(rows, summary, arguments.json)


if __name__ == "__main__":
  timing.run(main)
