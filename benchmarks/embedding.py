"""The gradient of the embedding lookup where most ids are one noise id.

    python -m benchmarks.embedding --shape=1.5b

A noised batch repeats one id thousands of times, and a scatter-add that resolves collisions by
compare and swap then waits for itself. "model" is the gradient as the model takes it, its final
norm beside it; the others are ways to add the same rows up.
"""

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.embedding")

from benchmarks import timing
from refine_jax.batch import Batch
from refine_jax.model import transformer


def _scatter(dtype):
  def gradient(table_VD, ids_N, rows_ND):
    zeros = jnp.zeros(table_VD.shape, dtype)
    return zeros.at[ids_N].add(rows_ND.astype(dtype)).astype(jnp.float32)

  return gradient


def _sorted(table_VD, ids_N, rows_ND):
  order = jnp.argsort(ids_N)
  return jax.ops.segment_sum(
    rows_ND[order].astype(jnp.float32), ids_N[order], table_VD.shape[0], indices_are_sorted=True
  )


def _model_gradient(config, dtype):
  def gradient(table_VD, ids_N, rows_ND):
    def hidden(table):
      scale = jnp.ones((config.width,))
      params = {"embedding": table, "layers": [], "final_norm": {"scale": scale}}
      batch = Batch(ids_N[None], jnp.zeros((1, ids_N.size), jnp.int32))
      return transformer.hidden_states(params, config, batch, lambda _: None, dtype=dtype)[0]

    return jax.vjp(hidden, table_VD)[1](rows_ND)[0]

  return gradient


def noised_ids(count: int, vocabulary: int, share: float) -> np.ndarray:
  """int32 [count]: the last id with probability `share`, else any other."""
  generator = np.random.default_rng(0)
  ids = generator.integers(0, vocabulary - 1, count)
  return np.where(generator.random(count) < share, vocabulary - 1, ids).astype(np.int32)


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--share", type=float, default=0.9, help="of tokens that are the noise id")
  arguments = parser.parse_args(argv)
  shape = timing.SHAPES[arguments.shape]
  config, tokens = shape.model, shape.rows * shape.length
  dtype = timing.default_dtype()
  keys = jax.random.split(jax.random.key(0), 2)
  table = jax.random.normal(keys[0], (config.vocab_size, config.width)) * 0.02
  cotangents = jax.random.normal(keys[1], (tokens, config.width), dtype)
  # What a pass over memory costs: the rows are read, the gradient is zeroed and written.
  moved = cotangents.nbytes + 2 * table.nbytes
  bandwidth = timing.copy_bytes_per_second(arguments.shape, arguments.repeats)
  strategies = {
    "model": _model_gradient(config, dtype),
    "scatter float32": _scatter(jnp.float32),
    "scatter bfloat16": _scatter(jnp.bfloat16),
    "sorted": _sorted,
  }
  rows = []
  for name, strategy in strategies.items():
    run = None
    for share in (0.0, arguments.share):
      ids = jnp.asarray(noised_ids(tokens, config.vocab_size, share))
      if run is None:
        run, compile_seconds = timing.compile_timed(strategy, table, ids, cotangents)
      seconds = timing.median_seconds(
        lambda run=run, ids=ids: run(table, ids, cotangents), arguments.repeats
      )
      rows.append(
        {
          "strategy": name,
          "noise_share": share,
          "ms": seconds * 1e3,
          "tokens_per_second": tokens / seconds,
          "share_of_ceiling": moved / seconds / bandwidth,
          "error": _error(run(table, ids, cotangents), table, ids, cotangents, name, config),
          "compile_seconds": compile_seconds,
          "peak_gib": timing.peak_gibibytes(),
          **timing.memory(run),
        }
      )
  summary = {
    "shape": f"{tokens} tokens, width {config.width}, vocabulary {config.vocab_size}",
    "device": jax.local_devices()[0].device_kind,
    "tokens": tokens,
    "copy_ceiling_gb_per_second": bandwidth / 1e9,
    "floor_ms": moved / bandwidth * 1e3,
  }
  return timing.report(rows, summary, arguments.json)


def _error(got_VD, table, ids, cotangents, strategy, config) -> float:
  """Relative, of the row of the commonest id, against a sum in float64."""
  common = int(np.bincount(np.asarray(ids)).argmax())
  of_it = np.flatnonzero(np.asarray(ids) == common)
  rows = np.asarray(cotangents[of_it], np.float64)
  if strategy == "model":
    # Through the norm by hand: with y = x / r, r its root mean square, dx = (g - y mean(g y)) / r.
    x = np.asarray(table[common].astype(cotangents.dtype), np.float64)
    r = np.sqrt(np.mean(x**2) + config.norm_eps)
    rows = (rows - x / r * np.mean(rows * x / r, axis=1, keepdims=True)) / r
  want = rows.sum(axis=0)
  got = np.asarray(got_VD[common], np.float64)
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


if __name__ == "__main__":
  timing.run(main)
