"""Everything that a plan says of a run on devices that are not here."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from refine_jax import sharding, target
from refine_jax.config import Config
from refine_jax.model import transformer
from refine_jax.model.transformer import ModelConfig
from refine_jax.planning import advice, collectives, devices, program, projection
from refine_jax.planning import memory as memory_lib
from refine_jax.planning.memory import Memory
from refine_jax.training import choices
from refine_jax.training import flops as flops_lib


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step and a pass take.

  Attributes:
    step: with all choices made.
    parameters: of the model, a number.
    tokens: of a step, all devices, padding included.
    model_flops, flops: of a device and step, as the MFU counts them, and with recomputation.
    projected: None where the step does not fit, or the device's peak is not known.
    decode: a pass of decoding; or why there is none.
    seconds: that compiling the step took.
    advice: what to change where it does not fit.
  """

  device: devices.Slice
  step: program.Step
  parameters: int
  tokens: int
  memory: Memory
  model_flops: float
  flops: float
  traffic: list[projection.Traffic]
  efficiency: float
  rows: program.Rows
  projected: projection.Projection | None
  decode: program.Pass | str
  seconds: float
  advice: list[str]


def make(
  config: Config,
  model: ModelConfig,
  wanted: devices.Slice,
  found: Sequence[Any],
  *,
  rows: program.Rows,
  efficiency: float,
  decode: tuple[int, int] | None,
) -> Plan:
  """Compiles a run's step for devices, and reads what it takes.

  Args:
    found: the devices, by `devices.find`.
    efficiency: the share of a device's peak that arithmetic reaches.
    decode: rows and places of a pass of decoding; None: it is left out.

  Raises:
    UserError: the mesh, the batch or the model does not fit the number of devices.
  """
  with target.compiling_for(wanted.target), devices.answering_for(wanted):
    mesh = sharding.make_mesh(config.mesh, found)
    step = program.make_step(config, model, mesh, rows)
    compiled, seconds, refused = _compiled(step)
    answer = _decode(config, model, found[0], wanted, decode)
    # Of one token, with every choice made.
    per_token = choices.flops_per_token(config, model, rows, rows.mean_length, step.step_config)
    peak = flops_lib.peak_flops()
  memory = memory_lib.read(step, compiled, wanted.kind.memory, refused)
  tokens = config.optim.batch_size * config.data.max_length
  again = projection.recomputed(
    model, step.forward.remat, flops_lib.attention_flops(model, rows.mean_length)
  )
  share = tokens / mesh.size
  forward = flops_lib.matmul_flops_per_token(model) + flops_lib.attention_flops(
    model, rows.mean_length
  )
  passes = per_token / (3 * forward)  # in units of one forward and backward pass over a token
  model_flops = per_token * share
  flops = model_flops + again * passes * share
  operations = collectives.read(compiled.as_text()) if compiled else []
  sent = projection.traffic(operations, wanted.kind, mesh.size)
  projected = None
  if compiled and peak:
    projected = projection.project(tokens, flops, sent, peak=peak, efficiency=efficiency)
  return Plan(
    device=wanted,
    step=step,
    parameters=sum(x.size for x in jax.tree.leaves(transformer.param_shapes(model))),
    tokens=tokens,
    memory=memory,
    model_flops=model_flops,
    flops=flops,
    traffic=sent,
    efficiency=efficiency,
    rows=rows,
    projected=projected,
    decode=answer,
    seconds=seconds,
    advice=advice.where_it_does_not_fit(config, step, memory) if memory.fits is False else [],
  )


def _compiled(step: program.Step) -> tuple[Any, float, str]:
  """The executable, the seconds, and "", or None and the reason why it cannot fit."""
  try:
    return *step.compile(), ""
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    found = re.search(r"Used [\d.]+\S* of [\d.]+\S*", str(error))
    return None, 0.0, found[0] if found else str(error).splitlines()[0][:200]


def _decode(config, model, device, wanted, decode) -> program.Pass | str:
  if decode is None:
    return "left out"
  one, room = program.pass_bytes(config, model, *decode), wanted.kind.memory
  if room is not None and one > room:
    return f"needs {one / 2**30:.1f} GiB, and a device has {room / 2**30:.1f}"
  return program.compile_pass(config, model, device, *decode)
