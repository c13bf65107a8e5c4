"""JAX's compilation cache: what one process has compiled, the next one finds."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax


def enable() -> None:
  """Keeps compiled programs between processes, where the user has not chosen a place for them.

  They are in ~/.cache/refine_jax/compiled (XDG_CACHE_HOME), and JAX_ENABLE_COMPILATION_CACHE=false
  keeps none. Programs for a CPU hold its own instructions, so machines that share a home directory
  but not their kind of CPU have places of their own.
  """
  config: Any = jax.config
  if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
    return
  home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  place = home / "refine_jax" / "compiled"
  if jax.default_backend() == "cpu":
    place /= "cpu-" + _instructions()
  config.update("jax_compilation_cache_dir", str(place))
  # Small programs too: together they are what a short call waits for.
  config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _instructions() -> str:
  """A name for what this CPU can run."""
  try:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:  # not Linux
    return "any"
  told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  return hashlib.sha256(told.encode()).hexdigest()[:12]
