"""The training step: time, tokens per second, MFU, memory; beside a PyTorch step where asked.

python -m benchmarks.step --shape=1.5b --rounds=2 --peer
python -m benchmarks.step --shape=tiny --json        # a CPU, seconds
"""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.step")

from benchmarks import timing
from refine_jax import target
from refine_jax.attention.choose import choose_backend
from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig, ObjectiveConfig, OptimConfig
from refine_jax.model import layout, transformer
from refine_jax.model import remat as remat_lib
from refine_jax.objective import plan as plan_lib
from refine_jax.training import flops as flops_lib
from refine_jax.training import forward as forward_lib
from refine_jax.training import memory, train_step
from refine_jax.training.step_config import StepConfig

_JOINS = {
  "attention": ("attention",),
  "mlp": ("mlp",),
  "yes": layout.MODULES,
  "no": (),
}


def random_batch(shape: timing.Shape, *, packed: bool, prompt: int) -> Batch:
  """Random tokens [1, B, T]: each example starts with `prompt` tokens that are not scored."""
  rows, length = shape.rows, shape.length
  segments = shape.segments if packed else 1
  rng = np.random.default_rng(0)
  # Unequal segments, the same in every row, that fill it.
  cuts = np.linspace(0, length, segments + 1).astype(int)
  if segments > 1:
    cuts[1:-1] += rng.integers(-length // (4 * segments), length // (4 * segments), segments - 1)
  lengths = np.diff(cuts)
  segment_ids = np.repeat(np.arange(1, segments + 1), lengths)
  positions = np.concatenate([np.arange(n) for n in lengths])
  batch = Batch(
    ids=rng.integers(0, shape.model.vocab_size - 1, (rows, length)),
    segment_ids=np.tile(segment_ids, (rows, 1)),
    positions=np.tile(positions, (rows, 1)),
    response_mask=np.tile(positions >= prompt, (rows, 1)),
    example_ids=segment_ids[None] + segments * np.arange(rows)[:, None],
  )
  return batch.map(lambda x: x.astype(bool if x.dtype == bool else np.int32)[None])


def example_length(batch: Batch) -> float:
  """Mean over tokens of the length of the token's example; attention's cost grows with it."""
  counts = np.unique(batch.example_ids, return_counts=True)[1].astype(float)
  return float(np.sum(counts**2) / np.sum(counts))


def make_step_config(shape: timing.Shape, rounds: int) -> StepConfig:
  return StepConfig(
    objective=ObjectiveConfig(
      num_iterations=rounds, loss_weights=(1.0,) * rounds, clean_weight=0.0
    ),
    noise=NoiseConfig(
      kind="uniform", block_size=8, offset_decay=1.0, noise_min=0.1, noise_max=0.9, token=-1
    ),
    optim=OptimConfig(
      batch_size=shape.rows,
      accumulation=1,
      total_epochs=1,
      total_steps=-1,
      lr=1e-5,
      warmup_ratio=0.05,
      betas=(0.9, 0.95),
      eps=1e-8,
      weight_decay=0.01,
      clip_grad=1.0,
      moment_dtype="float32",
      max_nonfinite=5,
    ),
    noise_token=shape.model.vocab_size - 1,
    eos_token=shape.model.vocab_size - 1,
    total_steps=1000,
    seed=0,
  )


def measure(shape: timing.Shape, arguments, *, packed: bool) -> dict:
  """One variant: compiles, runs, and reads what it cost."""
  dtype = timing.default_dtype()
  segments = shape.segments if packed else 1
  engine = choose_backend(
    arguments.attention,
    heads=shape.model.heads,
    kv_heads=shape.model.kv_heads,
    head_dim=shape.model.head_dim,
    dtype=dtype,
    max_segments=segments,
    packed=packed,
  )
  parameters = sum(x.size for x in jax.tree.leaves(transformer.param_shapes(shape.model)))
  remat = memory.choose_remat(
    arguments.remat,
    shape.model,
    dtype=dtype,
    tokens=shape.rows * shape.length,
    parameters=parameters,
    head_chunk=arguments.head_chunk,
    memory=target.memory(),
  )
  forward = forward_lib.ForwardConfig(
    model=shape.model,
    dtype=dtype,
    attention=engine,
    max_segments=segments,
    remat=remat,
    unroll=forward_lib.choose_unroll(arguments.unroll, remat, shape.model.layers),
    head_chunk=arguments.head_chunk,
    head_gradient=arguments.head_gradient,
    join=_JOINS[arguments.joined],
  )
  step_config = make_step_config(shape, arguments.rounds)
  # Each example attends to itself alone.
  batch = random_batch(shape, packed=packed, prompt=min(128, shape.length // 16))
  passes = plan_lib.passes(step_config.plan)
  flops = flops_lib.train_flops_per_token(shape.model, example_length(batch), passes)
  batch = jax.device_put(batch)
  state = jax.jit(
    lambda key: train_step.init_state(transformer.init_params(shape.model, key), step_config.optim)
  )(jax.random.key(0))
  start = time.perf_counter()
  step = train_step.jit_train_step(step_config, forward).lower(state, batch).compile()
  compile_seconds = time.perf_counter() - start

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics["loss_total"]

  seconds = timing.median_seconds(run, arguments.repeats)
  tokens = shape.rows * shape.length
  return {
    "variant": "packed" if packed else "one example a row",
    "rows": shape.rows,
    "length": shape.length,
    "attention": engine,
    "remat": remat,
    "layers": "apart" if forward.unroll >= shape.model.layers else f"scan {forward.unroll}",
    "joined": ",".join(forward.join),
    "step_ms": seconds * 1e3,
    "tokens_per_second": tokens / seconds,
    "mfu": mfu(tokens / seconds * flops),
    "model_tflops_per_second": tokens / seconds * flops / 1e12,
    "flops_per_token": flops,
    "peak_gib": timing.peak_gibibytes(),
    **timing.memory(step),
    "compile_seconds": compile_seconds,
    "loss": float(jax.device_get(run())),
  }


def mfu(flops_per_second: float) -> float | None:
  """The share of one device's dense bfloat16 peak; None where that is not known."""
  peak = flops_lib.peak_flops()
  return flops_per_second / peak if peak else None


def measure_peers(arguments, shape: timing.Shape) -> list[dict]:
  """PyTorch's step, two ways: half the rows with one backward pass, all with one a round.

  On a GPU each runs in a process of its own, before this one takes the memory.
  """
  try:
    import torch
  except ImportError:
    print("PyTorch is not installed, so there is no step of it beside ours.")
    return []
  rows = []
  for backward, count in (("joint", max(shape.rows // 2, 1)), ("round", shape.rows)):
    options = [
      f"--shape={arguments.shape}",
      f"--rounds={arguments.rounds}",
      f"--rows={count}",
      f"--repeats={arguments.repeats}",
      f"--backward={backward}",
    ]
    if not torch.cuda.is_available():
      from benchmarks import torch_step

      rows.append(torch_step.main(options))
      continue
    command = [sys.executable, "-m", "benchmarks.torch_step", *options]
    # It counts with our functions, but must not let JAX take memory there.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
      print(f"The PyTorch step failed: {' '.join(command)}")
      continue
    rows.append(json.loads(lines[-1]))
  return rows


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--rows", type=int, help="rows of the batch; default: the shape's")
  parser.add_argument(
    "--remat", choices=("auto", *remat_lib.POLICIES, *remat_lib.ALIASES), default="auto"
  )
  parser.add_argument("--attention", default="auto")
  parser.add_argument(
    "--unroll",
    type=int,
    default=0,
    help="layers a turn of the scan; all of them: no scan; default: as for a run",
  )
  parser.add_argument(
    "--joined", choices=_JOINS, default="attention", help="projections, of which modules"
  )
  parser.add_argument("--head_chunk", type=int, default=2048)
  parser.add_argument("--head_gradient", choices=("forward", "recompute"), default="forward")
  parser.add_argument("--variants", default="packed,unpacked")
  parser.add_argument("--peer", action="store_true", help="run a PyTorch step as well")
  arguments = parser.parse_args(argv)
  shape = timing.SHAPES[arguments.shape]
  if arguments.rows:
    shape = timing.Shape(shape.model, arguments.rows, shape.length, shape.segments)
  peers = measure_peers(arguments, shape) if arguments.peer else []
  rows = [
    timing.print_row(measure(shape, arguments, packed=variant == "packed"))
    for variant in arguments.variants.split(",")
  ]
  for peer in peers:
    peer["mfu"] = mfu(peer.get("model_tflops_per_second", 0.0) * 1e12) or None
  best = max((p["tokens_per_second"] or 0.0 for p in peers), default=0.0)
  for row in rows:
    row["times_peer"] = row["tokens_per_second"] / best if best else None
  first = {
    name: rows[0][name]
    for name in (
      "tokens_per_second",
      "mfu",
      "peak_gib",
      "compile_seconds",
      "temp_bytes",
      "times_peer",
    )
  }
  summary = {
    "shape": arguments.shape,
    "rounds": arguments.rounds,
    "device": jax.local_devices()[0].device_kind,
    "matmul_ceiling_tflops": timing.ceiling(arguments.shape, arguments.repeats) / 1e12,
    **first,
    "peer_tokens_per_second": best or None,
  }
  return timing.report(rows + peers, summary, arguments.json)


if __name__ == "__main__":
  timing.run(main)
