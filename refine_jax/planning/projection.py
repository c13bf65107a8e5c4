"""How long a step takes at least, by its arithmetic and by what goes between devices."""

import dataclasses
from collections.abc import Iterable

from refine_jax.model.config import ModelConfig
from refine_jax.planning.collectives import Collective
from refine_jax.planning.devices import Kind


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All collectives of one kind over groups of one size.

  Attributes:
    kind: see Collective.
    devices: of a group; 0: not known.
    hosts: over which a group reaches.
    count: runs in a step.
    bytes: of the results on a device, of all runs.
    seconds: that they take at least.
    counted: whether it is known how often each runs; else `count` has those loops once.
  """

  kind: str
  devices: int
  hosts: int
  count: int
  bytes: int
  seconds: float
  counted: bool


def traffic(found: Iterable[Collective], kind: Kind, devices: int) -> list[Traffic]:
  """Sums the collectives of a program by kind and group, the longest first."""
  sums: dict[tuple, Traffic] = {}
  for one in found:
    group = one.groups[0] if one.groups else ()
    if not group and one.kind != "collective-permute":
      group = tuple(range(devices))
    if len(group) == 1:
      continue
    hosts = len({x // kind.per_host for x in group}) if kind.network else 1
    key = (one.kind, len(group), max(hosts, 1))
    before = sums.get(key, Traffic(*key, 0, 0, 0.0, True))
    runs = 1 if one.runs is None else one.runs
    seconds = runs * one.seconds(kind.link, kind.network, kind.per_host, devices)
    sums[key] = Traffic(
      *key,
      before.count + runs,
      before.bytes + int(one.bytes * runs),
      before.seconds + seconds,
      before.counted and one.runs is not None,
    )
  return sorted(sums.values(), key=lambda x: -x.seconds)


def recomputed(model: ModelConfig, remat: str, attention: float) -> float:
  """FLOPs a token and pass that a backward pass computes anew (model/remat.py).

  Args:
    attention: FLOPs a token of all layers' scores and values.
  """
  query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
  matrix = 2 * model.layers * model.width
  if remat == "full":
    return matrix * (2 * query + 2 * key + 3 * model.feed_forward) + attention
  return matrix * 2 * model.feed_forward if remat == "save_attention" else 0.0


@dataclasses.dataclass(frozen=True)
class Projection:
  """A step's time at assumed speeds.

  Attributes:
    arithmetic, between: seconds of a step.
    slowest, fastest: tokens a second of all devices: where nothing of what goes between devices is
      hidden behind arithmetic, and where all of it is.
    peak: FLOP/s of a device, as its maker states.
    bound: what takes longer: "arithmetic" or "links".
  """

  arithmetic: float
  between: float
  slowest: float
  fastest: float
  peak: float

  @property
  def bound(self) -> str:
    return "arithmetic" if self.arithmetic >= self.between else "links"


def project(
  tokens: int, flops: float, found: Iterable[Traffic], *, peak: float, efficiency: float
) -> Projection:
  """Projects the speed of a step.

  Args:
    tokens: of a step, all devices.
    flops: of a device and step, those that are computed anew included.
    found: what a step sends between devices.
    peak: FLOP/s of a device.
    efficiency: the share of it that arithmetic reaches.
  """
  arithmetic = flops / (peak * efficiency)
  between = sum(x.seconds for x in found)
  slowest, fastest = tokens / (arithmetic + between), tokens / max(arithmetic, between)
  return Projection(arithmetic, between, slowest, fastest, peak)
