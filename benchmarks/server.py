"""The server: 64 streams against the engine alone, and the time to a first token at idle.

    python -m benchmarks.server --shape=1.5b
    python -m benchmarks.server --shape=tiny --json       # on a CPU, a minute

With random weights. The engine answers so many requests at once; then as many clients, in a
process of their own, ask the server for the same answers as streams. `share` is the quotient of the
two rates. `first_token_ms` is from the request to the first piece of its answer with nothing else
to do, `between_pieces_ms` between the pieces of the streams.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time

import jax

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.server")

from benchmarks import streams, timing
from benchmarks.engine import random_model
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import requests
from refine_jax.serving import command
from refine_jax.serving.served import Limits, Served
from refine_jax.serving.server import Server


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  tiny = {"streams": 8, "new": 48, "prompt": 20}
  large = {"streams": 64, "new": 256, "prompt": 100}
  for name, value in large.items():
    parser.add_argument(f"--{name}", type=int, help=f"default: {value}, tiny: {tiny[name]}")
  parser.add_argument("--block", type=int, default=8, help="tokens that a pass can commit")
  parser.set_defaults(repeats=5)
  arguments = parser.parse_args(argv)
  for name, value in (tiny if arguments.shape == "tiny" else large).items():
    if getattr(arguments, name) is None:
      setattr(arguments, name, value)
  # Answers of one length: nothing ends them before.
  model = dataclasses.replace(random_model(arguments.shape), eos_token_ids=())
  context = arguments.prompt + arguments.new
  options = Options(block_size=arguments.block)
  engine = Engine(model, arguments.streams, context, options)
  for samples in (False, True):
    engine.warm_up(context, samples=samples)
  summary = {"shape": arguments.shape, "device": jax.local_devices()[0].device_kind}
  summary |= timing.print_row(_alone(engine, arguments, options))
  summary |= timing.print_row(_served(engine, arguments, options))
  summary["share"] = summary["tokens_per_second"] / summary["engine_tokens_per_second"]
  summary["peak_gib"] = timing.peak_gibibytes()
  return timing.report([], summary, arguments.json)


def _alone(engine: Engine, arguments, options: Options) -> dict:
  """The engine's rate: all requests at once, no text looked at before it is whole."""
  options = dataclasses.replace(options, max_new_tokens=arguments.new)
  vocabulary = engine.model.config.vocab_size
  prompts = streams.prompts(arguments.streams, arguments.prompt, vocabulary)
  rates = []
  for _ in range(arguments.repeats):
    start, tokens = time.perf_counter(), 0
    for request in requests(engine.model, prompts, options):
      engine.submit(request)
    while engine.busy:
      tokens += sum(len(answer.tokens) for answer in engine.step())
    rates.append(tokens / (time.perf_counter() - start))
  assert tokens == arguments.streams * arguments.new
  return {"engine_tokens_per_second": statistics.median(rates)}


def _served(engine: Engine, arguments, options: Options) -> dict:
  """What clients in another process measure."""
  limits = Limits(context=engine.context, max_tokens=arguments.new, trace_tokens=0)
  more = {"prefix": [], "created": 0}
  served = Served(name="random", model=engine.model, options=options, limits=limits, **more)
  server, place = Server(served, engine), command.bind("127.0.0.1", 0)
  thread = threading.Thread(target=server.run, args=([place],))
  thread.start()
  try:
    while not (server.started and server.scheduler.state == "ready"):
      time.sleep(0.01)
    words = [f"--port={place.getsockname()[1]}", f"--vocabulary={engine.model.config.vocab_size}"]
    for name in ("streams", "new", "prompt", "repeats"):
      words.append(f"--{name}={getattr(arguments, name)}")
    program = [sys.executable, "-m", "benchmarks.streams", *words]
    found = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout
  finally:
    server.should_exit = True
    thread.join()
  return json.loads(found.splitlines()[-1])


if __name__ == "__main__":
  timing.run(main)
