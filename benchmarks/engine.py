"""The engine: programs of many unlike calls, time to a first token, what refilled slots gain.

    python -m benchmarks.engine --shape=1.5b
    python -m benchmarks.engine --shape=tiny --json       # on a CPU, minutes

Three parts, with random weights:

  calls    `generate` with prompts of any length, any number of rows, temperatures and stop strings;
           `programs` counts all that XLA compiled for them, small ones too.
  start    a new process, from a loaded model to its first token: with an empty compilation cache,
           and once more with what the first one left there (first_token_seconds).
  refill   requests whose answers differ in length through a number of slots, against batches that
           wait for their slowest row; the tokens are the same. refill_gain is the quotient of the
           two times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tokenizers
import transformers

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.engine")

from benchmarks import timing
from refine_jax import compile_cache
from refine_jax.decoding import generation, loading
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import requests
from refine_jax.model import transformer

_COMPILED = "/jax/core/compile/backend_compile_duration"
_TEMPERATURES, _STOPS = (0.0, 0.7, 1.0), ((), ("t7 t7",))


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  tiny = {"calls": 200, "longest": 200, "rows": 8, "problems": 100, "slots": 8, "new": 16}
  large = {"calls": 200, "longest": 2000, "rows": 64, "problems": 500, "slots": 32, "new": 64}
  for name, value in large.items():
    parser.add_argument(f"--{name}", type=int, help=f"default: {value}, tiny: {tiny[name]}")
  parser.add_argument("--parts", default="calls,start,refill")
  parser.add_argument("--block", type=int, default=8, help="tokens that a pass can commit")
  parser.add_argument("--first_token", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args(argv)
  for name, value in (tiny if arguments.shape == "tiny" else large).items():
    if getattr(arguments, name) is None:
      setattr(arguments, name, value)
  if arguments.first_token:
    return _first_token(arguments)
  summary: dict = {"shape": arguments.shape, "device": jax.local_devices()[0].device_kind}
  rows: list = []
  parts = arguments.parts.split(",")
  if "start" in parts:  # first, while no other process has the device's memory
    summary |= _start(arguments)
  model = random_model(arguments.shape)
  if "calls" in parts:
    summary |= _calls(model, arguments)
  if "refill" in parts:
    rows, more = _refill(model, arguments)
    summary |= more
  summary["peak_gib"] = timing.peak_gibibytes()
  return timing.report(rows, summary, arguments.json)


def random_model(shape: str) -> loading.Model:
  """Random weights, and a tokenizer of one word an id."""
  config, dtype = timing.SHAPES[shape].model, timing.default_dtype()

  @jax.jit
  def init(key):
    return jax.tree.map(lambda x: x.astype(dtype), transformer.init_params(config, key))

  words = tokenizers.models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, "t0")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
  params = jax.block_until_ready(init(jax.random.key(0)))
  return loading.Model(config, params, fast, (config.vocab_size - 1,), None, Path())


def _calls(model, arguments) -> dict:
  rng, compiled = np.random.default_rng(0), []

  def listener(event, seconds, **_):
    if event == _COMPILED:
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listener)
  start, programs, slowest, outside = time.perf_counter(), 0, 0.0, []
  try:
    for _ in range(arguments.calls):
      lengths = rng.integers(10, arguments.longest + 1, rng.integers(1, arguments.rows + 1))
      prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]
      begun = time.perf_counter()
      out = generation.generate(
        model,
        prompts,
        block_size=arguments.block,
        max_new_tokens=arguments.new,
        temperature=float(rng.choice(_TEMPERATURES)),
        stop=_STOPS[rng.integers(len(_STOPS))],
      )
      wall = time.perf_counter() - begun
      programs += out.programs
      slowest = max(slowest, wall)
      outside.append(wall - out.prefill_seconds - out.decode_seconds - out.compile_seconds)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  # All that XLA was asked for; the model's own parameters are made ready among them.
  result = {
    "programs": programs,
    "xla_programs": len(compiled),
    "calls_seconds": time.perf_counter() - start,
    "slowest_call_seconds": slowest,
    "host_ms_a_call": float(np.median(outside)) * 1e3,
  }
  return timing.print_row(result)


def _start(arguments) -> dict:
  command = [sys.executable, "-m", "benchmarks.engine", "--first_token"]
  command += [f"--shape={arguments.shape}", f"--new={arguments.new}", f"--block={arguments.block}"]
  result = {}
  with tempfile.TemporaryDirectory() as cache:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    for name in ("first_token_cold_seconds", "first_token_seconds"):
      run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
      result[name] = json.loads(run.stdout.splitlines()[-1])["seconds"]
  return timing.print_row(result)


def _first_token(arguments) -> dict:
  """Prints the seconds from a loaded model to its first token."""
  compile_cache.enable()
  # As `load` sets it, whoever chose the place.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  model = random_model(arguments.shape)
  prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 30).tolist()
  options = {"block_size": arguments.block, "max_new_tokens": arguments.new}
  start = time.perf_counter()
  next(generation.stream(model, [prompt], **options))
  result = {"seconds": time.perf_counter() - start}
  print(json.dumps(result))
  return result


def _refill(model, arguments) -> tuple[list, dict]:
  """Rows of a table, and refill_gain."""
  rng = np.random.default_rng(0)
  wanted = []
  for row in range(arguments.problems):
    prompt = rng.integers(0, model.config.vocab_size, rng.integers(50, 150)).tolist()
    # Lengths as of worked answers: most are short, some are several times as long.
    new = int(np.clip(rng.lognormal(np.log(arguments.new * 0.75), 0.6), 4, 4 * arguments.new))
    options = Options(block_size=arguments.block, max_new_tokens=new, eos_token_id=())
    wanted += requests(model, [prompt], options, rows=[row])
  engine = Engine(model, arguments.slots, options=wanted[0].options)
  batches = [wanted[i : i + arguments.slots] for i in range(0, len(wanted), arguments.slots)]
  _run(engine, batches[:1])  # compiles
  static, answers = _run(engine, batches)
  refilled, same = _run(engine, [wanted])
  for name, row in (("batches", static), ("refilled", refilled)):
    timing.print_row({"slots": name} | row)
  assert [answers[r].tokens for r in wanted] == [same[r].tokens for r in wanted], "other tokens"
  gain = static["seconds"] / refilled["seconds"]
  rows = [{"slots": "batches"} | static, {"slots": "refilled"} | refilled]
  return rows, {"refill_gain": gain, "host_ms_a_step": refilled["host_ms_a_step"]}


def _run(engine, groups) -> tuple[dict, dict]:
  """What it costs to answer groups of requests, one group after the other, and the answers."""
  answers, steps, before = {}, 0, engine.costs
  start = time.perf_counter()
  for group in groups:
    for request in group:
      engine.submit(request)
    while engine.busy:
      answers |= {answer.request: answer for answer in engine.step()}
      steps += 1
  seconds = time.perf_counter() - start
  costs = engine.costs.since(before)
  tokens = sum(len(answer.tokens) for answer in answers.values())
  host = seconds - costs.prefill_seconds - costs.decode_seconds - costs.compile_seconds
  return {
    "seconds": seconds,
    "prefill_seconds": costs.prefill_seconds,
    "decode_seconds": costs.decode_seconds,
    "steps": steps,
    "host_ms_a_step": host / steps * 1e3,
    "tokens": tokens,
    "tokens_per_second": tokens / seconds,
  }, answers


if __name__ == "__main__":
  timing.run(main)
