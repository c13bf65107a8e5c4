"""A step on a mesh, measured here or planned for devices that are not, for benchmarks.scaling."""

import dataclasses

import jax

from benchmarks import timing
from benchmarks.step import example_length, random_batch
from refine_jax import sharding
from refine_jax.config import Config, MeshConfig, ObjectiveConfig, OptimConfig
from refine_jax.config.schema import DataConfig, ModelSource
from refine_jax.model import transformer
from refine_jax.planning import collectives, devices, plan, program, projection, report
from refine_jax.training import choices, flops, train_step


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
    **_named("measured", arguments.shape, config, step),
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
  wanted = devices.parse(f"{arguments.device}:{size(mesh_name)}")
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
    **_named("projected", arguments.shape, config, made.step),
    "device": wanted.kind.kind,
    "peak_gib": made.memory.peak and made.memory.peak / 2**30,
    "fits": made.memory.fits,
    "compile_seconds": made.seconds,
    "collectives": [dataclasses.asdict(x) for x in made.traffic],
  }
  if made.projected is None:
    return row
  each = (made.projected.slowest / size(mesh_name), made.projected.fastest / size(mesh_name))
  per_token = made.model_flops * size(mesh_name) / made.tokens
  peak = made.projected.peak
  return row | {
    "step_ms": [made.tokens / size(mesh_name) / rate * 1e3 for rate in each],
    "tokens_per_second_device": list(each),
    "mfu": [rate * per_token / peak for rate in each],
    "assumptions": report.assumptions(made),
  }


def size(mesh: str) -> int:
  a, b, c = map(int, mesh.split("x"))
  return a * b * c


def _named(kind, shape, config, step) -> dict:
  sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
  forward = step.forward
  apart = forward.unroll >= forward.model.layers
  return {
    "row": kind,
    "shape": shape,
    "rounds": config.objective.num_iterations,
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


def efficiency(row: dict, shape: str) -> float | None:
  """The share of the device's peak that a measured row reaches, recomputation included."""
  if row["mfu"] is None:
    return None
  model = timing.SHAPES[shape].model
  attention = flops.attention_flops(model, row["length"] / timing.SHAPES[shape].segments)
  forward = flops.matmul_flops_per_token(model) + attention
  return row["mfu"] * (1 + projection.recomputed(model, row["remat"], attention) / (3 * forward))
