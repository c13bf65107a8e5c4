"""How a training step scales: meshes x accumulation, measured, beside what plans project.

python -m benchmarks.scaling --shape=1.5b --meshes=1x1x1,2x1x1,1x2x1,1x1x2 --accumulation=1,8
JAX_PLATFORMS=cpu python -m benchmarks.scaling --shape=tiny --rows=1 --meshes=1x1x1,2x1x1

Each mesh (data x fsdp x tensor) runs in a process of its own and prints one JSON object on a line.
Rows of a micro-batch grow with the devices, so one device has as much to do on every mesh. On a CPU
devices are simulated. Projections are programs compiled for devices that are not here, with the
share of the peak that one device was measured to reach.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.scaling")

from benchmarks import timing
from benchmarks.step import example_length, random_batch
from refine_jax import sharding
from refine_jax.config import Config, MeshConfig, ObjectiveConfig, OptimConfig
from refine_jax.config.schema import DataConfig, ModelSource
from refine_jax.errors import UserError
from refine_jax.model import remat as remat_lib
from refine_jax.model import transformer
from refine_jax.planning import collectives, devices, plan, program, projection, report
from refine_jax.training import choices, flops, train_step

_PROJECTED = "2x1x1,1x2x1,1x1x2,4x1x1,1x4x1,8x1x1,1x8x1,2x4x1,1x4x2"


def make_config(arguments, mesh: str, accumulation: int) -> Config:
  """The run that is timed: uniform noise, full rows."""
  sizes = [int(x) for x in mesh.split("x")]
  count = sizes[0] * sizes[1] * sizes[2]
  shape = timing.SHAPES[arguments.shape]
  rounds = arguments.rounds
  return Config(
    data=DataConfig(max_length=arguments.length or shape.length),
    model=ModelSource(
      compute_dtype=arguments.dtype or timing.default_dtype(),
      remat=arguments.remat,
      attention=arguments.attention,
      scan_unroll=arguments.unroll,
    ),
    objective=ObjectiveConfig(num_iterations=rounds, loss_weights=(1.0,) * rounds),
    optim=OptimConfig(
      batch_size=(arguments.rows or shape.rows) * accumulation * count,
      accumulation=accumulation,
      moment_dtype=arguments.moment_dtype,
    ),
    mesh=MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))),
  )


def measure(arguments, mesh_name: str, accumulation: int) -> dict:
  """Compiles and times the step on the devices of this process."""
  config = make_config(arguments, mesh_name, accumulation)
  shape = timing.SHAPES[arguments.shape]
  rows = program.Rows(config.data.max_length, shape.segments)
  mesh = sharding.make_mesh(config.mesh)
  step = program.make_step(config, shape.model, mesh, rows)
  compiled, seconds = step.compile()
  places = jax.tree.map(lambda x: x.sharding, step.state)
  state = jax.jit(
    lambda key: train_step.init_state(transformer.init_params(shape.model, key), config.optim),
    out_shardings=places,
  )(jax.random.key(0))
  whole = timing.Shape(shape.model, config.optim.batch_size, rows.length, rows.examples)
  batch = random_batch(whole, packed=True, prompt=min(128, rows.length // 16))
  length = example_length(batch)
  batch = batch.map(lambda x: x.reshape(accumulation, -1, rows.length))
  batch = sharding.put_batch(batch, mesh, accumulated=True)

  def run():
    nonlocal state
    state, metrics = compiled(state, batch, None)
    return metrics["loss_total"]

  took = timing.median_seconds(run, arguments.repeats)
  tokens = config.optim.batch_size * rows.length
  per_token = choices.flops_per_token(config, shape.model, rows, length, step.step_config)
  peak, rate = flops.peak_flops(), tokens / took / mesh.size
  kind = mesh.devices.flat[0].device_kind
  known = next((k for k in devices.KINDS.values() if k.kind == kind), None)
  return {
    **_named("measured", config, step),
    "device": kind,
    "step_ms": took * 1e3,
    "tokens_per_second": tokens / took,
    "tokens_per_second_device": rate,
    "flops_per_token": per_token,
    "mfu": rate * per_token / peak if peak else None,
    "peak_gib": peak_gibibytes(mesh),
    **timing.memory(compiled),
    "compile_seconds": seconds,
    "collectives": _collectives(compiled, known or devices.KINDS["cpu"], mesh.size),
    "loss": float(jax.device_get(run())),
  }


def project(arguments, mesh_name: str, accumulation: int) -> dict:
  """The same from a plan, for devices that are not here."""
  config = make_config(arguments, mesh_name, accumulation)
  wanted = devices.parse(f"{arguments.device}:{_size(mesh_name)}")
  devices.prepare(wanted)
  shape = timing.SHAPES[arguments.shape]
  made = plan.make(
    config,
    shape.model,
    wanted,
    devices.find(wanted),
    rows=program.Rows(config.data.max_length, shape.segments),
    efficiency=arguments.efficiency,
    decode=None,
  )
  row = {
    **_named("projected", config, made.step),
    "device": wanted.kind.kind,
    "peak_gib": made.memory.peak and made.memory.peak / 2**30,
    "fits": made.memory.fits,
    "compile_seconds": made.seconds,
    "collectives": [dataclasses.asdict(x) for x in made.traffic],
  }
  if made.projected is None:
    return row
  each = (made.projected.slowest / _size(mesh_name), made.projected.fastest / _size(mesh_name))
  per_token = made.model_flops * _size(mesh_name) / made.tokens
  peak = made.projected.peak
  return row | {
    "step_ms": [made.tokens / _size(mesh_name) / rate * 1e3 for rate in each],
    "tokens_per_second_device": list(each),
    "mfu": [rate * per_token / peak for rate in each],
    "assumptions": report.assumptions(made),
  }


def _size(mesh: str) -> int:
  a, b, c = map(int, mesh.split("x"))
  return a * b * c


def _named(kind, config, step) -> dict:
  sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
  forward = step.forward
  apart = forward.unroll >= forward.model.layers
  return {
    "row": kind,
    "mesh": "x".join(map(str, sizes)),
    "devices": step.mesh.size,
    "accumulation": config.optim.accumulation,
    "rows_a_device": config.optim.micro_batch // step.mesh.size,
    "length": config.data.max_length,
    "attention": forward.attention,
    "remat": forward.remat,
    "layers": "apart" if apart else f"scan {forward.unroll}",
  }


def _collectives(compiled, kind, count) -> list[dict]:
  found = collectives.read(compiled.as_text())
  return [dataclasses.asdict(x) for x in projection.traffic(found, kind, count)]


def peak_gibibytes(mesh) -> float | None:
  """The most memory in use on any of the mesh's devices since the process started."""
  stats = [device.memory_stats() or {} for device in mesh.devices.flat]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) / 2**30 if peaks else None


def in_own_process(argv: list[str], mesh: str, accumulation: int, more: list[str]) -> dict:
  """A row from a process of its own, whose memory ends with it."""
  environment = dict(os.environ)
  environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  if "--one=projected" in more:
    environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
  command = [sys.executable, "-m", "benchmarks.scaling", *argv, *more]
  command += [f"--meshes={mesh}", f"--accumulation={accumulation}"]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    return {"row": "failed", "mesh": mesh, "accumulation": accumulation, "command": command[2:]}
  return json.loads(lines[-1])


def compared(rows: list[dict]) -> list[dict]:
  """The rows, with how each device's speed stands to that of one device alone."""
  alone = {
    (row["device"], row["accumulation"]): row["tokens_per_second_device"]
    for row in rows
    if row["row"] == "measured" and row["devices"] == 1
  }
  for row in rows:
    rate = row.get("tokens_per_second_device")
    one = alone.get((row.get("device"), row["accumulation"]))
    if rate is None or one is None:
      continue
    row["of_one_device"] = [x / one for x in rate] if isinstance(rate, list) else rate / one
  return rows


def efficiency(row: dict, shape: str) -> float | None:
  """The share of the device's peak that a measured row reaches, recomputation included."""
  if row["mfu"] is None:
    return None
  model = timing.SHAPES[shape].model
  attention = flops.attention_flops(model, row["length"] / timing.SHAPES[shape].segments)
  forward = flops.matmul_flops_per_token(model) + attention
  return row["mfu"] * (1 + projection.recomputed(model, row["remat"], attention) / (3 * forward))


def parse(argv) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--shape", choices=timing.SHAPES, default="1.5b")
  parser.add_argument("--rows", type=int, help="of a device and micro-batch; default: the shape's")
  parser.add_argument("--length", type=int, help="of a row; default: the shape's")
  parser.add_argument("--meshes", default="1x1x1,2x1x1,1x2x1,1x1x2", help="data x fsdp x tensor")
  parser.add_argument("--accumulation", default="1", help="a list: 1,8")
  parser.add_argument("--project", default=_PROJECTED, help="meshes; empty: none")
  parser.add_argument("--device", help="of projections (planning/devices.py); default: as here")
  parser.add_argument("--efficiency", type=float, help="of projections; default: as measured")
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5, help="timed steps; the median is reported")
  parser.add_argument(
    "--remat", choices=("auto", *remat_lib.POLICIES, *remat_lib.ALIASES), default="auto"
  )
  parser.add_argument("--attention", default="auto")
  parser.add_argument("--unroll", type=int, default=0, help="as config.model.scan_unroll")
  parser.add_argument("--dtype", help="default: bfloat16, on a CPU float32")
  parser.add_argument("--moment_dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument(
    "--output", type=Path, help="rows go there too; those there are not run again"
  )
  parser.add_argument("--one", choices=("measured", "projected"), help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def main(argv=None) -> list[dict]:
  argv = sys.argv[1:] if argv is None else list(argv)
  arguments = parse(argv)
  turns = timing.integers(arguments.accumulation)
  for mesh in filter(None, f"{arguments.meshes},{arguments.project}".split(",")):
    if len(mesh.split("x")) != 3 or not all(x.isdigit() and int(x) for x in mesh.split("x")):
      raise UserError(f"{mesh!r} is no mesh; write data x fsdp x tensor, such as 2x1x1.")
  if arguments.one:
    if arguments.one == "measured":
      jax.config.update("jax_num_cpu_devices", _size(arguments.meshes))
    row = {"measured": measure, "projected": project}[arguments.one](
      arguments, arguments.meshes, turns[0]
    )
    print(json.dumps(row))
    return [row]
  there = []
  if arguments.output and arguments.output.exists():
    there = [json.loads(x) for x in arguments.output.read_text(encoding="utf-8").splitlines()]
  rows = []

  def add(kind, mesh, turn, more=()):
    known = (kind, mesh, turn)
    row = next((r for r in there if (r["row"], r["mesh"], r["accumulation"]) == known), None)
    if row is None:
      row = in_own_process(argv, mesh, turn, [f"--one={kind}", *more])
      if arguments.output and row["row"] != "failed":
        with arguments.output.open("a", encoding="utf-8") as file:
          file.write(json.dumps(row) + "\n")
    rows.append(row)
    print(json.dumps(compared(rows)[-1]), flush=True)

  for turn in turns:
    for mesh in arguments.meshes.split(","):
      add("measured", mesh, turn)
  first = next((r for r in rows if r["row"] == "measured"), None)
  for turn in turns:
    for mesh in filter(None, arguments.project.split(",")):
      measured = [r for r in rows if r["row"] == "measured" and r["accumulation"] == turn]
      reached = next((efficiency(r, arguments.shape) for r in measured if r["devices"] == 1), None)
      name = arguments.device or _device_name(first)
      share = arguments.efficiency or reached or 0.5
      dtype = arguments.dtype or ("float32" if name == "cpu" else "bfloat16")
      add(
        "projected", mesh, turn, [f"--device={name}", f"--efficiency={share}", f"--dtype={dtype}"]
      )
  failed = [r for r in rows if r["row"] == "failed"]
  print("\n" + timing.table([_short(r) for r in rows]))
  if failed:
    raise UserError(f"{len(failed)} of {len(rows)} rows failed; what each said is above.")
  return rows


def _device_name(row: dict | None) -> str:
  names = [name for name, kind in devices.KINDS.items() if row and kind.kind == row["device"]]
  return names[0] if names else "h100"


def _short(row: dict) -> dict:
  """A row as a line of a table: one number or a range in each cell."""
  names = ("row", "mesh", "accumulation", "step_ms", "tokens_per_second_device", "of_one_device")
  names += ("mfu", "peak_gib", "compile_seconds")

  def cell(value):
    return " to ".join(f"{x:.4g}" for x in value) if isinstance(value, list) else value

  sent = row.get("collectives", ())
  return {name: cell(row.get(name)) for name in names} | {
    "sent_gib": sum(x["bytes"] for x in sent) / 2**30
  }


if __name__ == "__main__":
  timing.run(main)
