"""A plan as lines and as JSON."""

import dataclasses
from typing import Any

from refine_jax import sharding
from refine_jax.planning.plan import Plan
from refine_jax.planning.program import Pass
from refine_jax.training.flops import DEVICES

_GIB = 2**30


def _gib(count: float) -> str:
  return f"{count / _GIB:.2f} GiB"


def lines(plan: Plan) -> list[str]:
  """What a plan says, for people."""
  forward, memory, kind = plan.step.forward, plan.memory, plan.device.kind
  mesh = plan.step.mesh
  axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
  optim = plan.step.step_config.optim
  per_device = optim.micro_batch // sharding.batch_shards(mesh)
  layers = forward.model.layers
  how = "apart" if forward.unroll >= layers else f"in a scan of {forward.unroll} a turn"
  result = [
    f"device        {mesh.size} x {kind.kind}, mesh {axes}",
    f"model         {plan.parameters / 1e6:.1f} M parameters, {layers} layers",
    f"compute       {forward.dtype}, attention {forward.attention}, remat {forward.remat}, layers"
    f" {how}, head gradient {forward.head_gradient}",
    f"batch         {optim.batch_size} rows of {plan.rows.length}: {optim.accumulation}"
    f" micro-batches of {optim.micro_batch}, {per_device} a device",
    f"memory        {_gib(memory.parameters)} of parameters, {_gib(memory.optimizer)} of optimizer"
    + (f", {_gib(memory.base)} of the base" if memory.base else "")
    + " a device",
    f"              {_fit(plan)}",
  ]
  if plan.seconds:
    result.append(f"compiled      in {plan.seconds:.1f} s")
  result += [f"to change     {x}" for x in plan.advice]
  more = plan.flops / plan.model_flops - 1
  again = f", and {more:.0%} more computed anew" if more else ""
  result.append(f"FLOPs         {plan.model_flops:.3g} a device and step{again}")
  for sent in plan.traffic:
    hosts = f" on {sent.hosts} hosts" if sent.hosts > 1 else ""
    over = f" over {sent.devices}{hosts}" if sent.devices else ""
    count = f"{sent.count}" if sent.counted else f"at least {sent.count}"
    result.append(
      f"{sent.kind:18}{over.strip()}: {count} a step, {_gib(sent.bytes)}, at least"
      f" {sent.seconds * 1e3:.1f} ms"
    )
  if plan.projected:
    p = plan.projected
    result += [
      f"projected     {p.slowest:,.0f} to {p.fastest:,.0f} tokens/s,"
      f" {p.slowest / mesh.size:,.0f} to {p.fastest / mesh.size:,.0f} a device; arithmetic"
      f" {p.arithmetic:.3f} s, between devices {p.between:.3f} s a step: bound by {p.bound}",
      *(f"assumed       {x}" for x in assumptions(plan)),
    ]
  return [*result, *_decode_lines(plan)]


def _fit(plan: Plan) -> str:
  memory = plan.memory
  room = "" if memory.room is None else f" of {_gib(memory.room)}"
  if memory.refused:
    return f"does not fit{room}: the compiler says {memory.refused}"
  assert memory.peak is not None and memory.temporaries is not None
  fits = {True: ": fits", False: ": DOES NOT FIT", None: ""}[memory.fits]
  return f"{_gib(memory.temporaries)} of temporaries; peak {_gib(memory.peak)}{room}{fits}"


def assumptions(plan: Plan) -> list[str]:
  """What a projection rests on."""
  kind = plan.device.kind
  assert plan.projected is not None
  peak = plan.projected.peak
  between = f"{kind.link / 1e9:.0f} GB/s a device to its neighbours"
  if plan.device.crosses_hosts and kind.network:
    between += f", {kind.network / 1e9:.0f} GB/s to other hosts"
  return [
    f"arithmetic at {plan.efficiency:g} of {peak / 1e12:.0f} TFLOP/s; {between}, nothing lost; the"
    " first rate hides none of what goes between devices behind arithmetic, the second all",
    f"full rows with {plan.rows.examples} examples of {plan.rows.mean_length:.0f} tokens, all"
    " response",
  ]


def _decode_lines(plan: Plan) -> list[str]:
  made = plan.decode
  if isinstance(made, str):
    return [f"decoding      {made}"]
  found = made_numbers(plan, made)
  speed = f", at least {found['seconds'] * 1e3:.2f} ms" if found["seconds"] else ""
  return [
    f"decoding      one device, {made.rows} rows of {made.places} places, {made.tokens} tokens a"
    f" row ({made.draft}): {_gib(made.parameter_bytes)} of parameters, {_gib(made.cache_bytes)} of"
    f" caches, peak {_gib(found['peak'])}; a pass reads {_gib(found['read'])}{speed}"
  ]


def made_numbers(plan: Plan, made: Pass) -> dict:
  """Bytes of a pass of decoding, and the least seconds at the bandwidth of the memory."""
  analysis = made.compiled.memory_analysis()
  peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
  read = made.parameter_bytes + made.cache_bytes
  bandwidth = next((d.bandwidth for d in DEVICES if d.kind in plan.device.kind.kind), None)
  return {"peak": peak, "read": read, "seconds": read / bandwidth if bandwidth else None}


def as_json(plan: Plan) -> dict[str, Any]:
  """The same for programs: bytes, seconds, FLOPs and tokens a second as numbers."""
  forward, mesh, made = plan.step.forward, plan.step.mesh, plan.decode
  decode: Any = made
  if isinstance(made, Pass):
    decode = {
      x.name: getattr(made, x.name) for x in dataclasses.fields(made) if x.name != "compiled"
    } | made_numbers(plan, made)
  return {
    "device": plan.device.name,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "parameters": plan.parameters,
    "compute": {
      name: getattr(forward, name)
      for name in ("dtype", "attention", "remat", "unroll", "head_gradient", "draft_attention")
    },
    "memory": dataclasses.asdict(plan.memory) | {"fits": plan.memory.fits},
    "flops": {"model": plan.model_flops, "computed": plan.flops},
    "collectives": [dataclasses.asdict(x) for x in plan.traffic],
    "projection": plan.projected
    and dataclasses.asdict(plan.projected)
    | {"tokens": plan.tokens, "bound": plan.projected.bound, "assumptions": assumptions(plan)},
    "decode": decode,
    "advice": plan.advice,
    "compile_seconds": plan.seconds,
  }
