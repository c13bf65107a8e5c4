"""Says what refine_jax finds on this machine: refine-jax doctor [--no_probe].

Versions, devices, attention, caches, what is missing, and the command that brings it. The exit
status is 1 where something that every command needs is missing.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from packaging.requirements import Requirement

from refine_jax.cli import entry_point

_NAME = "refine_jax"
_SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")
# cuDNN's packed attention needs jax 0.11.2, which needs this Python (setup.cfg says more).
_GPU_PYTHON = (3, 12)
# Queries share keys here, as in every family that is supported.
_PROBED = {"heads": 8, "kv_heads": 2, "head_dim": 64}
_MEANINGS = {
  "gpu": "train and decode on an NVIDIA GPU",
  "tpu": "train and decode on a TPU",
  "plan": "refine-jax plan, in an environment of its own",
  "serve": "refine-jax serve",
  "eval": "refine-jax lm-eval, --scorer=math",
  "plot": "plots",
  "tasks": "the reasoning tasks",
  "wandb": "log.logger with wandb",
  "docs": "the documentation as a site",
  "test": "scripts/test.sh",
}


def requirements(extra: str = "") -> list[Requirement]:
  """What this installation requires on this Python: of an extra, or of every command."""
  found = [Requirement(line) for line in importlib.metadata.requires(_NAME) or ()]
  if not extra:
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
  return [
    r
    for r in found
    if r.marker is not None
    and "extra" in str(r.marker)
    and r.marker.evaluate({"extra": extra})
    and not r.marker.evaluate({"extra": ""})
  ]


def why_missing(requirement: Requirement) -> str | None:
  """None where an installed package is what is required, else what is there instead."""
  try:
    version = importlib.metadata.version(requirement.name)
  except importlib.metadata.PackageNotFoundError:
    return f"{requirement.name} is not installed"
  if not requirement.specifier.contains(version, prereleases=True):
    return f"{requirement.name} is {version}, required is {requirement.specifier}"
  # An extra of a package is what that package requires with it, and so on.
  for extra in requirement.extras:
    for line in importlib.metadata.requires(requirement.name) or ():
      inner = Requirement(line)
      if inner.marker and inner.marker.evaluate({"extra": extra}):
        if not inner.marker.evaluate({"extra": ""}) and (reason := why_missing(inner)):
          return reason
  return None


def command(extra: str, missing: list[Requirement]) -> str:
  """The pip command that brings an extra, or what every command needs where `extra` is empty."""
  if extra == "gpu" and sys.version_info < _GPU_PYTHON:
    return f"make an environment of Python {_GPU_PYTHON[0]}.{_GPU_PYTHON[1]} or later first"
  root = Path(__file__).parents[1]
  if (root / "setup.cfg").is_file():
    return f"in {root}: pip install -e '.{f'[{extra}]' if extra else ''}'"
  return " ".join(["pip install", *(f"'{str(r).partition(';')[0].strip()}'" for r in missing)])


def packages() -> tuple[list[str], bool]:
  """Lines on what every command needs, and whether all of it is there."""
  lost = [(r, reason) for r in requirements() if (reason := why_missing(r))]
  if not lost:
    return [_line("packages", "all that every command needs is there")], True
  lines = [_line("packages", f"{reason}") for _, reason in lost]
  return [*lines, _line("", command("", [r for r, _ in lost]))], False


def extras() -> list[str]:
  """A line for each extra: whether it is there, and what brings it."""
  lines = []
  for extra in importlib.metadata.metadata(_NAME).get_all("Provides-Extra") or ():
    lost = [(r, reason) for r in requirements(extra) if (reason := why_missing(r))]
    state = f"{lost[0][1]}: {command(extra, [r for r, _ in lost])}" if lost else "there"
    if lost and extra == "gpu" and sys.version_info < _GPU_PYTHON:
      state = f"this Python is too old for it: {command(extra, [])}"
    label = f"{extra:6} ({_MEANINGS[extra]})" if extra in _MEANINGS else extra
    lines.append(_line("" if lines else "extras", f"{label}: {state}"))
  return lines


def devices() -> tuple[list[str], bool]:
  """Lines on what JAX computes with, and whether it starts."""
  import jax

  try:
    found = jax.devices()
  except RuntimeError as error:
    first = str(error).splitlines()[0]
    return [_line("devices", f"JAX does not start: {first}")], False
  stats = found[0].memory_stats() or {}
  room = f", {stats['bytes_limit'] / 2**30:.1f} GiB each" if "bytes_limit" in stats else ""
  text = f"{len(found)} x {found[0].device_kind}{room}, of {jax.default_backend()}"
  lines = [_line("devices", text)]
  if jax.default_backend() == "cpu" and _DRIVER.is_file():
    if os.environ.get("JAX_PLATFORMS", "") in ("", "cuda", "gpu"):
      how = command("gpu", requirements("gpu"))
      lines.append(_line("", f"an NVIDIA GPU is here, which this jax does not use: {how}"))
    else:
      lines.append(_line("", "an NVIDIA GPU is here, which JAX_PLATFORMS leaves out"))
  return lines, True


def engines() -> list[str]:
  """Lines on which attention runs and answers right here, tried on small problems."""
  import jax

  from refine_jax.attention import cached, ranged
  from refine_jax.attention.choose import choose_backend
  from refine_jax.errors import UserError
  from refine_jax.model.config import ModelConfig
  from refine_jax.model.rope import RopeConfig

  lines = []
  fast = {"gpu": ["cudnn_packed"], "tpu": ["splash"]}.get(jax.default_backend(), [])
  chosen = "xla"
  for engine in fast:
    try:
      chosen = choose_backend(
        engine, dtype="bfloat16", max_segments=8, packed=True, blocks=True, **_PROBED
      )
    except UserError as error:
      lines.append(_line("", str(error)))
  small = ModelConfig(
    vocab_size=8,
    width=8,
    feed_forward=8,
    layers=1,
    norm_eps=1e-6,
    rope=RopeConfig(theta=1e4),
    tied_head=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None,),
    max_length=8,
    initializer_range=0.02,
    heads=_PROBED["heads"],
    kv_heads=_PROBED["kv_heads"],
    head_dim=_PROBED["head_dim"],
  )
  drafts = ranged.choose(*_PROBED.values(), "bfloat16")
  decoding = cached.choose_engine(small, "bfloat16")
  text = f"training {chosen}, drafts of gated adapters {drafts}, decoding {decoding} (bfloat16)"
  return [_line("attention", text), *lines]


def caches() -> list[str]:
  """A line for each place where something is kept between commands."""
  import jax
  from huggingface_hub import constants

  from refine_jax import compile_cache
  from refine_jax.config.schema import DataConfig
  from refine_jax.data.tokenize import cache_root

  compile_cache.enable()
  places = {
    "compiled programs": getattr(jax.config, "jax_compilation_cache_dir", None),
    "tokenised data": cache_root(DataConfig()),
    "models of the hub": constants.HF_HUB_CACHE,
  }
  return [
    _line("caches" if not i else "", f"{what:18} {state_of(place)}")
    for i, (what, place) in enumerate(places.items())
  ]


def state_of(place: str | Path | None) -> str:
  """Says of a cache's directory whether it can be written, and what room it has; None: off."""
  if not place:
    return "off (JAX_ENABLE_COMPILATION_CACHE)"
  place = Path(place)
  there = next(p for p in (place, *place.absolute().parents) if p.exists())
  if not os.access(there, os.W_OK):
    return f"{place}: {there} cannot be written"
  new = "" if place.exists() else "not made yet, "
  return f"{place}: {new}{shutil.disk_usage(there).free / 2**30:.0f} GiB free"


def _line(label: str, text: str) -> str:
  return f"{label:<13} {text}".rstrip()


@entry_point
def main() -> int:
  """Runs `refine-jax doctor`."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--no_probe", action="store_true", help="leave out devices and attention")
  arguments = parser.parse_args()
  from refine_jax import __version__

  where = Path(__file__).parent
  print(_line("refine_jax", f"{__version__}, {where}"))
  print(_line("python", f"{platform.python_version()}, {platform.platform()}"))
  lines, ready = packages()
  print(*lines, sep="\n")
  if not ready:
    return 1
  versions = (f"{name} {importlib.metadata.version(name)}" for name in _SHOWN)
  print(_line("versions", ", ".join(versions)))
  started = True
  if not arguments.no_probe:
    lines, started = devices()
    print(*lines, sep="\n", flush=True)
    print(*(engines() if started else ()), sep="\n")
  print(*caches(), *extras(), sep="\n")
  return 0 if started else 1


if __name__ == "__main__":
  main()
