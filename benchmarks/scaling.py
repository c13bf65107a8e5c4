"""How a training step scales: meshes x accumulation, measured, beside what plans project.

python -m benchmarks.scaling --shape=1.5b --meshes=1x1x1,2x1x1,1x2x1,1x1x2 --accumulation=1,8
JAX_PLATFORMS=cpu python -m benchmarks.scaling --shape=tiny --rows=1 --meshes=1x1x1,2x1x1

Each mesh (data x fsdp x tensor) runs in a process of its own and prints one JSON object on a line.
Rows of a micro-batch grow with the devices, so one device has as much to do on every mesh. On a CPU
devices are simulated. Projections are programs compiled for devices that are not here, with the
share of the peak that one device was measured to reach.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.scaling")

from benchmarks import mesh_step, timing
from refine_jax.errors import UserError
from refine_jax.model import remat as remat_lib
from refine_jax.planning import devices

_PROJECTED = "2x1x1,1x2x1,1x1x2,4x1x1,1x4x1,8x1x1,1x8x1,2x4x1,1x4x2"


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


def compared(row: dict, alone: list[dict]) -> None:
  """Adds to a row how its devices' speed stands to that of one such device alone."""
  rate, same = row.get("tokens_per_second_device"), ("device", "accumulation")
  one = [r for r in alone if [r[x] for x in same] == [row.get(x) for x in same]]
  if rate is None or not one:
    return
  base = one[0]["tokens_per_second_device"]
  row["of_one_device"] = [x / base for x in rate] if isinstance(rate, list) else rate / base


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


class Rows:
  """The rows so far, and those of earlier calls, which are not run again."""

  def __init__(self, arguments, argv: list[str]) -> None:
    self._arguments, self._argv = arguments, argv
    self._output = arguments.output
    self.rows: list[dict] = []
    self._there = []
    if self._output and self._output.exists():
      lines = self._output.read_text(encoding="utf-8").splitlines()
      self._there = [r for r in map(json.loads, lines) if self._like(r)]

  def _like(self, row: dict) -> bool:
    shape = timing.SHAPES[self._arguments.shape]
    rows, length = self._arguments.rows or shape.rows, self._arguments.length or shape.length
    here = (self._arguments.shape, rows, length, self._arguments.rounds)
    return (row["shape"], row["rows_a_device"], row["length"], row["rounds"]) == here

  def add(self, kind: str, mesh: str, turn: int, more: tuple[str, ...] = ()) -> None:
    """Runs one, or takes it from an earlier call, and prints it."""
    known = (kind, mesh, turn)
    row = next((r for r in self._there if _key(r) == known), None)
    if row is None:
      row = in_own_process(self._argv, mesh, turn, [f"--one={kind}", *more])
      if self._output and row["row"] != "failed":
        with self._output.open("a", encoding="utf-8") as file:
          file.write(json.dumps(row) + "\n")
    self.rows.append(row)
    compared(row, self.alone())
    print(json.dumps(row), flush=True)

  def alone(self) -> list[dict]:
    """Measured rows of one device."""
    found = self._there + self.rows
    return [r for r in found if r["row"] == "measured" and r["devices"] == 1]

  def project(self, mesh: str, turn: int) -> None:
    """Adds a row for devices of the kind that was measured, at the speed that one of them has."""
    options = self._arguments
    kinds = [r["device"] for r in self.rows if r["row"] == "measured"]
    names = [name for name, kind in devices.KINDS.items() if kind.kind in kinds]
    name = options.device or next(iter(names), "h100")
    reached = [
      mesh_step.efficiency(r, options.shape)
      for r in self.alone()
      if r["accumulation"] == turn
      and devices.KINDS.get(name, devices.KINDS["cpu"]).kind == r["device"]
    ]
    share = options.efficiency or next(filter(None, reached), 0.5)
    dtype = options.dtype or ("float32" if name == "cpu" else "bfloat16")
    more = (f"--device={name}", f"--efficiency={share}", f"--dtype={dtype}")
    self.add("projected", mesh, turn, more)


def _key(row: dict) -> tuple:
  return row["row"], row["mesh"], row["accumulation"]


def main(argv=None) -> list[dict]:
  argv = sys.argv[1:] if argv is None else list(argv)
  arguments = parse(argv)
  turns = timing.integers(arguments.accumulation)
  meshes, wanted = (
    [x for x in text.split(",") if x] for text in (arguments.meshes, arguments.project)
  )
  for mesh in meshes + wanted:
    if len(mesh.split("x")) != 3 or not all(x.isdigit() and int(x) for x in mesh.split("x")):
      raise UserError(f"{mesh!r} is no mesh; write data x fsdp x tensor, such as 2x1x1.")
  if arguments.one:
    # On a CPU devices are simulated; too late where this process has looked for them already.
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", mesh_step.size(meshes[0]))
    make = {"measured": mesh_step.measure, "projected": mesh_step.project}[arguments.one]
    rows = [make(arguments, meshes[0], turns[0])]
    print(json.dumps(rows[0]))
    return rows
  found = Rows(arguments, argv)
  for turn in turns:
    for mesh in meshes:
      found.add("measured", mesh, turn)
  for turn in turns:
    for mesh in wanted:
      found.project(mesh, turn)
  failed = [r for r in found.rows if r["row"] == "failed"]
  print("\n" + timing.table([_short(r) for r in found.rows]))
  if failed:
    raise UserError(f"{len(failed)} of {len(found.rows)} rows failed; what each said is above.")
  return found.rows


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
