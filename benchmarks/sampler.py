"""The sampler: prefill, one pass and its share of the roofline, tokens per second by mode.

    python -m benchmarks.sampler --shape=1.5b --peer
    python -m benchmarks.sampler --torch_model=DIR      # a Hugging Face directory's weights

Three times tell the device's part of a pass from the host's:

  pass_ms  a pass in a loop of fixed length, launched at once: what the device needs.
  loop_ms  a pass in `sampler.decode`, whose loop ends when rows are done: on a GPU the host reads
           that before it launches the next pass. Decoding without stop strings.
  call_ms  a pass as a call of its own, the flag read in Python: streaming, one pass a piece.

With --adapter_rank passes are timed without and with a gated adapter, and the modes run with it.

host_share is 1 - pass_ms / loop_ms, stream_host_share 1 - pass_ms / call_ms.
"""

import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.sampler")

from benchmarks import timing
from refine_jax.decoding import generation, loading, programs, sampler
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import requests
from refine_jax.hf import export as hf_export
from refine_jax.hf import peft
from refine_jax.model import adapters, transformer
from refine_jax.training import flops as flops_lib

_PASSES = 32
# add_eos_length=7, with which the method was first described.
_FIXED_BLOCK, _FIXED_PASSES = 8, 2


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--batches", default="1,32", type=timing.integers)
  parser.add_argument("--blocks", default="1,16", type=timing.integers)
  parser.add_argument("--modes", default="ar,exact,fixed", help="may be empty: passes alone")
  parser.add_argument(
    "--draft", default="tail", choices=("tail", "branches"), help="of the passes timed"
  )
  parser.add_argument(
    "--adapter_rank", type=int, help="also time the passes with a random gated adapter"
  )
  parser.add_argument("--prompt", type=int, default=128, help="tokens")
  parser.add_argument("--new", type=int, help="tokens to decode; default: 256, tiny: 32")
  parser.add_argument("--peer", action="store_true", help="run PyTorch on the same weights")
  parser.add_argument("--torch_model", help="weights for both, not random ones; sets --peer")
  arguments = parser.parse_args(argv)
  arguments.new = arguments.new or (32 if arguments.shape == "tiny" else 256)
  dtype = timing.default_dtype()
  model = _model(arguments, dtype)
  config, itemsize = model.config, jnp.dtype(dtype).itemsize
  ceilings = {
    "bytes": timing.copy_bytes_per_second(arguments.shape, arguments.repeats),
    "flops": timing.ceiling(arguments.shape, arguments.repeats),
  }
  if arguments.adapter_rank:
    model = with_random_adapter(model, arguments.adapter_rank)
  passes = [
    timing.print_row(_measure_passes(model, rank, rows, block, arguments, ceilings))
    for rows in arguments.batches
    for block in arguments.blocks
    for rank in ([0, arguments.adapter_rank] if arguments.adapter_rank else [0])
  ]
  prompts = {rows: _prompts(config, rows, arguments.prompt) for rows in arguments.batches}
  results = {
    (mode, rows): _measure_mode(model, prompts[rows], mode, arguments)
    for rows in arguments.batches
    for mode in filter(None, arguments.modes.split(","))
  }
  rows = [row for row, _ in results.values()]
  # Last, so that our numbers are there if it fails.
  if results and (arguments.peer or arguments.torch_model):
    rows += _measure_peers(model, prompts, results, arguments, dtype)
  summary = {
    "shape": arguments.torch_model or arguments.shape,
    "device": jax.local_devices()[0].device_kind,
    "dtype": dtype,
    "prompt": arguments.prompt,
    "new": arguments.new,
    "copy_ceiling_gb_per_second": ceilings["bytes"] / 1e9,
    "matmul_ceiling_tflops": ceilings["flops"] / 1e12,
    "weight_bytes": weight_bytes(config, itemsize),
    "peak_gib": timing.peak_gibibytes(),
  }
  if arguments.adapter_rank:
    summary["adapter_rank"] = arguments.adapter_rank
    summary["times_without_adapter"] = times_without_adapter(passes)
  return timing.report(rows, summary, arguments.json, passes=passes)


def _model(arguments, dtype) -> loading.Model:
  if arguments.torch_model:
    return loading.load(arguments.torch_model, dtype=dtype)
  config = timing.SHAPES[arguments.shape].model

  @jax.jit
  def init(key):
    return jax.tree.map(lambda x: x.astype(dtype), transformer.init_params(config, key))

  return loading.Model(config, init(jax.random.key(0)), None, (), None, Path())


def with_random_adapter(model: loading.Model, rank: int) -> loading.Model:
  """The same model with an adapter of all projections, whose values change no time."""
  shape = adapters.Adapter(rank=rank)
  factors = adapters.init_params(model.config, shape, jax.random.key(1))
  # B is zero in a new one.
  factors = jax.tree.map(lambda x: x + 0.01, factors)
  return dataclasses.replace(model, adapter=peft.LoadedAdapter(shape, factors))


def times_without_adapter(passes: list[dict]) -> dict:
  """ "ROWS x BLOCK" -> a pass with the adapter over one without."""
  pairs: dict = {}
  for row in passes:
    key = f"{row['batch']} x {row['block']}"
    pairs.setdefault(key, {})[row["adapter_rank"] > 0] = row["pass_ms"]
  return {key: times[True] / times[False] for key, times in pairs.items()}


def _prompts(config, rows, length) -> list[list[int]]:
  return np.random.default_rng(0).integers(0, config.vocab_size - 1, (rows, length)).tolist()


def weight_bytes(config, itemsize: int) -> int:
  """What a pass reads of the parameters: all but an embedding that is not the head as well."""
  shapes = transformer.param_shapes(config)
  if not config.tied_head:
    shapes = {k: v for k, v in shapes.items() if k != "embedding"}
  return itemsize * sum(x.size for x in jax.tree.leaves(shapes))


def pass_cost(
  config, *, rows: int, tokens: int, predictions: int, context: int, itemsize: int
) -> tuple[int, int]:
  """(bytes, flops) that a pass over so many tokens a row needs after `context` tokens each.

  Args:
    predictions: of the tokens, those that meet the head.
  """
  cache = 2 * config.kv_heads * config.head_dim * config.layers * itemsize
  moved = weight_bytes(config, itemsize) + rows * (context + tokens) * cache
  scores = 4 * config.heads * config.head_dim * config.layers * context
  head = 2 * config.width * config.vocab_size
  layers = flops_lib.matmul_flops_per_token(config) - head
  return moved, rows * (tokens * (layers + scores) + predictions * head)


def _measure_passes(model, rank, rows, block, arguments, ceilings) -> dict:
  """A row of the table; `rank` of the adapter, 0 for the base alone."""
  config = model.config
  if not rank:
    model = dataclasses.replace(model, adapter=None)
  options = Options(
    mode="exact",
    block_size=block,
    draft=arguments.draft,
    max_new_tokens=arguments.new,
    noise_token=config.vocab_size - 1,
    eos_token_id=(),
  )
  wanted = requests(model, _prompts(config, rows, arguments.prompt), options)
  runner = Engine(model, rows, options=options).entered(wanted)
  params = runner.params
  settings = dataclasses.replace(runner.settings, sampling="greedy")
  costs = runner.costs
  # Copies, as the programs below take over the state that they are given.
  kept = jax.tree.map(jnp.copy, runner.state)

  def fresh():
    return jax.block_until_ready(jax.tree.map(jnp.copy, kept))

  def decode(passes):
    runner.state = fresh()
    start = time.perf_counter()
    _, looped, _ = runner.decode(np.zeros(rows, bool), passes, 1)
    return time.perf_counter() - start, int(np.max(looped))

  def fixed_loop(params, state):
    body = lambda _, s: sampler.one_pass(params, s, config=config, settings=settings)[0]  # noqa: E731
    return jax.lax.fori_loop(0, _PASSES, body, state)

  program = jax.jit(fixed_loop, donate_argnums=1).lower(params, kept)
  program = program.compile(programs.compiler_options(rows * settings.tokens))
  seconds = {"pass": [], "loop": [], "call": []}
  # The first of each is not timed.
  for _ in range(arguments.repeats + 1):
    # A pass over rows that are done costs the same, so this loop needs no room to go on.
    seconds["pass"].append(programs.timed(program, params, fresh())[1] / _PASSES)
    spent, looped = decode(_PASSES)
    seconds["loop"].append(spent / looped)
    seconds["call"].append(_one_by_one(runner, fresh()))
  times = {name: statistics.median(values[1:]) for name, values in seconds.items()}
  itemsize = params["embedding"].dtype.itemsize
  moved, flops = pass_cost(
    config,
    rows=rows,
    tokens=settings.tokens if settings.extra_tokens else block,
    predictions=settings.width,
    context=arguments.prompt,
    itemsize=itemsize,
  )
  return {
    "batch": rows,
    "block": block,
    "draft": arguments.draft,
    "adapter_rank": rank,
    "engine": settings.engine,
    # Of all prompts, a few pieces at a time.
    "prefill_ms": costs.prefill_seconds * 1e3,
    "pass_ms": times["pass"] * 1e3,
    "loop_ms": times["loop"] * 1e3,
    "call_ms": times["call"] * 1e3,
    "host_share": 1 - times["pass"] / times["loop"],
    "stream_host_share": 1 - times["pass"] / times["call"],
    **_roofline(moved, flops, times["pass"], ceilings),
    "loop_passes": looped,
    "compile_seconds": costs.compile_seconds,
    **timing.memory(program),
  }


def _one_by_one(runner, state) -> float:
  """Seconds a pass as an engine runs them for a stream."""
  runner.state, passes, done = state, 0, False
  none = np.zeros(runner.slots, bool)
  start = time.perf_counter()
  while not done and passes < _PASSES:
    done = bool(runner.decode(none, 1, 1)[2].all())
    passes += 1
  return (time.perf_counter() - start) / passes


def _roofline(moved, flops, seconds, ceilings) -> dict:
  """The larger of the two times that the device's ceilings allow, and its share of `seconds`.

  By what this run measured, and by what the device's makers state.
  """
  memory, work = moved / ceilings["bytes"], flops / ceilings["flops"]
  peak, bandwidth = flops_lib.peak_flops(), flops_lib.peak_bandwidth()
  nominal = max(moved / bandwidth, flops / peak) if peak and bandwidth else None
  return {
    "bytes": moved,
    "flops": flops,
    "roofline_ms": max(memory, work) * 1e3,
    "bound": "memory" if memory >= work else "compute",
    "roofline_share": max(memory, work) / seconds,
    "nominal_roofline_share": nominal / seconds if nominal else None,
  }


def _measure_mode(model, prompts, mode, arguments) -> tuple:
  """A row of the table, and the tokens."""
  block = {"ar": 1, "fixed": _FIXED_BLOCK}.get(mode, max(arguments.blocks))

  def run():
    start = time.perf_counter()
    out = generation.generate(
      model,
      prompts,
      mode=mode,
      block_size=block,
      max_new_tokens=arguments.new,
      eos_token_id=(),
      noise_token=model.config.vocab_size - 1,
      refine_iter=_FIXED_PASSES,
    )
    return time.perf_counter() - start, out

  compile_seconds = run()[1].compile_seconds
  runs = [run() for _ in range(min(arguments.repeats, 3))]
  wall, out = sorted(runs, key=lambda pair: pair[0])[len(runs) // 2]
  count = sum(map(len, out.tokens))
  row = {
    "mode": mode,
    "batch": len(prompts),
    "block": block,
    "tokens": count,
    "passes": max(out.passes),
    "tokens_per_pass": out.tokens_per_pass,
    "tokens_per_second": out.tokens_per_second,
    "prefill_ms": out.prefill_seconds * 1e3,
    "decode_ms": out.decode_seconds * 1e3,
    # All that the caller waits for.
    "wall_ms": wall * 1e3,
    "wall_tokens_per_second": count / wall,
    "compile_seconds": compile_seconds,
  }
  return timing.print_row(row), out.tokens


def _measure_peers(model, prompts, results, arguments, dtype) -> list[dict]:
  """PyTorch on the same weights and prompts: greedy generate, and the refinement of `fixed`."""
  try:
    from benchmarks import torch_generate
  except ImportError:
    print("PyTorch or transformers is not installed, so there is no peer beside ours.")
    return []
  with tempfile.TemporaryDirectory() as directory:
    place = arguments.torch_model
    if not place:
      place = Path(directory) / "model"
      files = torch_generate.write_config(model.config, Path(directory) / "files")
      hf_export.export(model.params, files, place, dtype=dtype)
    net = torch_generate.load(place, dtype)
  greedy = functools.partial(torch_generate.greedy, net, new=arguments.new)
  refine = functools.partial(
    torch_generate.refine,
    net,
    new=arguments.new,
    block=_FIXED_BLOCK,
    passes=_FIXED_PASSES,
    noise_token=model.config.vocab_size - 1,
  )
  peers = {"ar": ("torch generate", greedy), "exact": ("torch generate", greedy)}
  peers |= {"fixed": ("torch refinement", refine)}
  measured = {}
  for (mode, count), (ours, tokens) in results.items():
    if mode not in peers:
      continue
    name, function = peers[mode]
    if (name, count) not in measured:
      measured[name, count] = torch_generate.measure(
        name, function, prompts[count], min(arguments.repeats, 3), net.device
      )
    row, theirs = measured[name, count]
    ours["times_peer"] = ours["wall_tokens_per_second"] / row["wall_tokens_per_second"]
    # All of them in float32; in bfloat16 rounding parts the two.
    ours["same_as_peer"] = float(np.mean(np.equal(tokens, theirs)))
  return [row for row, _ in measured.values()]


if __name__ == "__main__":
  timing.run(main)
