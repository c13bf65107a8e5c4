"""What a compiled program sends between devices, read from its text."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*)[a-z0-9]*\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)')
_CALLS = re.compile(
  r"(?:calls|to_apply|branch_computations|true_computation|false_computation)"
  r"=\{?([%\w.\-, ]+)\}?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One operation of a program.

  Attributes:
    kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
    arrays: dtype and shape of each result: ("f32", (2, 3)).
    runs: how often it runs in a call of the program; None: in a loop of unknown length.
    groups: int [groups, devices of each]; empty: all devices, or, for a permutation, not known.
    name: where it comes from in the model.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  runs: int | None
  groups: tuple[tuple[int, ...], ...]
  name: str

  @property
  def looped(self) -> bool:
    """Whether it stands in a loop."""
    return self.runs != 1

  @property
  def bytes(self) -> int:
    """Bytes of its result on a device, of one run."""
    return int(sum(_item_bytes(dtype) * math.prod(shape) for dtype, shape in self.arrays))

  @property
  def total(self) -> int:
    """Bytes of its results in a call of the program; loops of unknown length count once."""
    return self.bytes * (self.runs or 1)

  def seconds(self, link: float, network: float | None, per_host: int, devices: int) -> float:
    """The least time of one run at these bytes/s a device, between neighbours and between hosts.

    Args:
      network: None: all devices are neighbours.
    """
    group = self.groups[0] if self.groups else tuple(range(devices))
    if self.kind == "collective-permute":
      return self.bytes / link
    size = len(group)
    hosts = len({x // per_host for x in group}) if network else 1
    result = _sent(self.kind, self.bytes, size) / link
    if hosts > 1 and network:
      # A host's devices share what goes to other hosts; of a scattered sum each has its part.
      whole = self.bytes * (size if self.kind == "reduce-scatter" else 1)
      passes = 2 if self.kind == "all-reduce" else 1
      between = passes * whole * (hosts - 1) / hosts / (size // hosts)
      result = max(result, between / network)
    return result


def _sent(kind: str, result: int, size: int) -> float:
  """Bytes that a device sends in a ring, or straight to each of the others."""
  share = (size - 1) / size
  return {
    "all-reduce": 2 * result * share,
    "reduce-scatter": result * (size - 1),
  }.get(kind, result * share)


def _item_bytes(dtype: str) -> float:
  if dtype in ("pred", "token"):
    return 1 if dtype == "pred" else 0
  found = re.search(r"\d+", dtype)
  return int(found[0]) / 8 if found else 4


def read(text: str) -> list[Collective]:
  """Finds every collective of a program, with how often it runs.

  Args:
    text: of the compiled program, `compiled.as_text()`.
  """
  bodies, entry = _computations(text)
  found = []
  for line, runs in _walk(bodies, entry, 1):
    match = _COLLECTIVE.search(line)
    if match:
      name = re.search(r'op_name="([^"]*)"', line)
      found.append(
        Collective(
          match[2],
          tuple(_result(match[1], match[2], bool(match[3]))),
          runs,
          _groups(line),
          name[1] if name else "",
        )
      )
  return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies: dict[str, list[str]] = {}
  lines, entry = [], ""
  for line in text.splitlines():
    begin = None if line.startswith(" ") else _HEADER.match(line)
    if begin:
      lines = bodies.setdefault(begin[2], [])
      entry = begin[2] if begin[1] else entry
    else:
      lines.append(line)
  return bodies, entry


def _walk(bodies: dict, name: str, runs: int | None) -> Iterator[tuple[str, int | None]]:
  """Every line that is reached, with how often it runs."""
  for line in bodies.get(name, ()):
    if " while(" in line:
      inside = {k: re.search(rf"{k}=%?([\w.-]+)", line) for k in ("body", "condition")}
      turns = _turns(bodies, line, inside["condition"])
      more = None if turns is None or runs is None else runs * turns
      if inside["body"]:
        yield from _walk(bodies, inside["body"][1], more)
      continue
    yield line, runs
    # A started operation names what it calls again where it ends.
    if "async-done(" in line or "async-update(" in line:
      continue
    for names in _CALLS.findall(line):
      for called in re.findall(r"[\w.-]+", names):
        if called in bodies:
          yield from _walk(bodies, called, runs)


def _turns(bodies: dict, line: str, condition: re.Match | None) -> int | None:
  """Turns of a loop: as it says itself, or the one number that its condition compares with."""
  known = _TRIPS.search(line)
  if known:
    return int(known[1])
  inside = "\n".join(bodies.get(condition[1], ())) if condition else ""
  limits = set(re.findall(r"= s32\[\][^ ]* constant\((\d+)\)", inside))
  return int(limits.pop()) if len(limits) == 1 else None


def _result(shape: str, kind: str, started: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
  """The arrays of a result; what starts one also gives its operands, first."""
  shape = re.sub(r"/\*.*?\*/", "", shape)
  if started and kind != "all-reduce" and shape.startswith("("):
    shape = _parts(shape)[1]
  for dtype, sizes in _ARRAY.findall(shape):
    yield dtype, tuple(int(x) for x in sizes.split(",") if x)


def _parts(shape: str) -> list[str]:
  """The elements of a tuple's type."""
  depth, parts = 0, [""]
  for c in shape[1:-1]:
    depth += (c in "([{") - (c in ")]}")
    if c == "," and not depth:
      parts.append("")
    else:
      parts[-1] += c
  return parts


@functools.cache
def _numbers(text: str) -> tuple[tuple[int, ...], ...]:
  """[2,4]<=[8] and [4,2]<=[2,4]T(1,0): an arange in a shape, turned, and in another shape."""
  found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  assert found, text
  shape, before, order = ([int(x) for x in (g or "").split(",") if x] for g in found.groups())
  ids = np.arange(math.prod(before)).reshape(before)
  return tuple(map(tuple, (ids.transpose(order) if order else ids).reshape(shape).tolist()))


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
  found = re.search(r"replica_groups=(\{\{.*?\}\}|\[[^ ]*?\](?:T\([\d,]+\))?(?=[, ]|$))", line)
  if found and found[1].startswith("{"):
    return tuple(
      tuple(int(x) for x in g.split(",") if x) for g in re.findall(r"\{([\d,]+)\}", found[1])
    )
  if found:
    return _numbers(found[1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
  if not named:
    return ()
  # Newer XLA: mesh['data'=2,'fsdp'=4] {'data'}.
  sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named[1])}
  over = re.findall(r"'(\w+)'", named[2])
  ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
  axes = list(sizes)
  last = [axes.index(a) for a in over]
  order = [i for i in range(len(axes)) if i not in last] + last
  width = math.prod(sizes[a] for a in over)
  return tuple(map(tuple, ids.transpose(order).reshape(-1, width).tolist()))
