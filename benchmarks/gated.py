"""The training step of a gated adapter on a frozen base: tokens a second, memory, MFU.

    python -m benchmarks.gated --shape=1.5b --accumulation=2
    python -m benchmarks.gated --shape=1.5b --length=16384 --rows=1 --segments=1 --anchors=256
    python -m benchmarks.gated --shape=8b --accumulation=4

Tokens are those of the clean rows. FLOPs per token are a forward pass of the clean text, and a
forward pass and one backward pass for activations of each draft: recomputation is not counted.
"""

import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.gated")

from benchmarks import timing
from benchmarks.step import mfu, random_batch
from refine_jax.attention import ranged
from refine_jax.attention.choose import choose_backend
from refine_jax.config import NoiseConfig, ObjectiveConfig, OptimConfig
from refine_jax.model import adapters, transformer
from refine_jax.model import remat as remat_lib
from refine_jax.objective import draft_blocks
from refine_jax.training import flops, train_step
from refine_jax.training import forward as forward_lib
from refine_jax.training.step_config import StepConfig


def measure(shape: timing.Shape, arguments) -> dict:
  """Compiles the step, runs it, and reads what it cost."""
  model, dtype = shape.model, timing.default_dtype()
  forward = forward_lib.ForwardConfig(
    model=model,
    dtype=dtype,
    attention=choose_backend(
      arguments.attention,
      heads=model.heads,
      kv_heads=model.kv_heads,
      head_dim=model.head_dim,
      dtype=dtype,
      max_segments=shape.segments,
      packed=True,
    ),
    max_segments=shape.segments,
    remat=arguments.remat,
    unroll=model.layers if arguments.unroll == 0 else arguments.unroll,
    head_chunk=arguments.head_chunk,
    join=("attention",),
    adapter=adapters.Adapter(rank=arguments.rank, alpha=8.0 * arguments.rank),
    draft_attention=arguments.draft_attention
    or ranged.choose(model.heads, model.kv_heads, model.head_dim, dtype),
  )
  batch = random_batch(shape, packed=True, prompt=min(128, shape.length // 16))
  drafts = arguments.block_size - 1
  most = most_tiles(batch, drafts)
  noise = NoiseConfig(kind="block", block_size=arguments.block_size, anchors=arguments.anchors)
  config = StepConfig(
    objective=ObjectiveConfig(num_iterations=1, loss_weights=(1.0,), draft_target=arguments.target),
    noise=noise,
    optim=OptimConfig(batch_size=shape.rows, lr=1e-4),
    noise_token=model.vocab_size - 1,
    eos_token=model.vocab_size - 1,
    total_steps=1000,
    seed=0,
    gated=True,
    most_tiles=most,
  )
  frozen = random_base(forward)
  state = jax.jit(
    lambda key: train_step.init_state(
      adapters.init_params(model, forward.adapter, key), config.optim
    )
  )(jax.random.key(1))
  batch = jax.device_put(batch.map(lambda x: x.reshape(arguments.accumulation, -1, x.shape[-1])))
  start = time.perf_counter()
  step = train_step.jit_train_step(config, forward).lower(state, batch, frozen).compile()
  compile_seconds = time.perf_counter() - start

  def run():
    nonlocal state
    state, metrics = step(state, batch, frozen)
    return metrics["loss_total"]

  seconds = timing.median_seconds(run, arguments.repeats)
  rate = shape.rows * shape.length / seconds
  blocks = draft_blocks.count_blocks(shape.length, arguments.anchors, drafts, most)
  share = blocks * drafts / shape.length
  flops_per_token = flops.gated_flops_per_token(model, shape.length / shape.segments, share)
  return {
    "rows": shape.rows,
    "length": shape.length,
    "accumulation": arguments.accumulation,
    "blocks": blocks,
    "target": arguments.target,
    "remat": arguments.remat,
    "attention": f"{forward.attention}, {forward.draft_attention}",
    "step_ms": seconds * 1e3,
    "tokens_per_second": rate,
    "mfu": mfu(rate * flops_per_token),
    "peak_gib": timing.peak_gibibytes(),
    **timing.memory(step),
    "compile_seconds": compile_seconds,
    "loss": float(jax.device_get(run())),
  }


def random_base(forward: forward_lib.ForwardConfig) -> dict:
  """A frozen base of random numbers, made in its own dtype: in float32 8 B parameters are 32 GB."""
  model = forward.model
  shapes = jax.eval_shape(forward.freeze, transformer.param_shapes(model))

  def draw(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) * model.initializer_range

  def leaf(path, x):
    if path[-1].key == "scale":
      return jnp.ones(x.shape, x.dtype)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(jax.tree_util.keystr(path).encode()))
    # Slice by slice: the random bits of a whole stack would be twice as large as it.
    keys = jax.random.split(key, x.shape[0] if x.ndim == 3 else 1)
    shape = x.shape[1:] if x.ndim == 3 else x.shape
    draws = jax.jit(lambda keys: jax.lax.map(lambda key: draw(key, shape, x.dtype), keys))(keys)
    return draws if x.ndim == 3 else draws[0]

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def most_tiles(batch, drafts: int) -> int:
  """The most blocks that tile the responses of any row, as a run counts them."""
  rows = zip(batch.example_ids[0], batch.response_mask[0], strict=True)
  return max(
    int(np.sum(draft_blocks.most_tiles(np.unique(ids[mask], return_counts=True)[1], drafts)))
    for ids, mask in rows
  )


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--rows", type=int, help="rows of the batch; default: the shape's")
  parser.add_argument("--length", type=int, help="of a row; default: the shape's")
  parser.add_argument("--segments", type=int, help="examples of a row; default: the shape's")
  parser.add_argument("--accumulation", type=int, default=1)
  parser.add_argument("--anchors", type=int, default=0, help="blocks for each row; 0: all")
  parser.add_argument("--block_size", type=int, default=16)
  parser.add_argument("--rank", type=int, default=128)
  parser.add_argument("--target", choices=("data", "greedy", "kl", "tv"), default="kl")
  parser.add_argument("--remat", choices=remat_lib.POLICIES, default="save_attention_mlp")
  parser.add_argument("--attention", default="auto")
  parser.add_argument("--draft_attention", help="xla or kernel; default: what works here")
  parser.add_argument("--unroll", type=int, default=1, help="layers a step of the scan; 0: all")
  parser.add_argument("--head_chunk", type=int, default=2048)
  arguments = parser.parse_args(argv)
  shape = timing.SHAPES[arguments.shape]
  shape = timing.Shape(
    shape.model,
    arguments.rows or shape.rows,
    arguments.length or shape.length,
    arguments.segments or shape.segments,
  )
  row = timing.print_row(measure(shape, arguments))
  summary = {
    "shape": arguments.shape,
    "device": jax.local_devices()[0].device_kind,
    "matmul_ceiling_tflops": timing.ceiling(arguments.shape, arguments.repeats) / 1e12,
    **{name: row[name] for name in ("tokens_per_second", "mfu", "peak_gib", "compile_seconds")},
  }
  return timing.report([row], summary, arguments.json)


if __name__ == "__main__":
  main()
