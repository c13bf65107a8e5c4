"""Every test runs on the CPU, as eight devices, offline, with silent broadcasting forbidden."""

import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time, and code that is not optimised does the same. A machine that is
# busy elsewhere may keep a device from its collective for longer than XLA's patience.
_FLAGS = [
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
  "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
if int(importlib.metadata.version("jaxlib").split(".")[1]) <= 10:  # later ones have one emitter
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What several tests compile is compiled once, for all processes of a run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="refine_jax-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402  the flags above come first
import pytest  # noqa: E402

# Tracing makes many objects and few cycles; looking for those took a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  """Tokenised data of a test never meets that of a user or of another test."""
  monkeypatch.setenv("REFINE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
  """A process may have 65,530 memory maps, and a compiled program takes about 160 of them.

  Programs are dropped only where there are many, since small ones serve the next file too.
  """
  yield
  maps = Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") > 15_000:
    jax.clear_caches()
