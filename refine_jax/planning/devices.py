"""Devices that can be compiled for without being here, by name: h100:8, v5e:2x4.

Numbers are those that their makers state, but for `memory`: what a process may take.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from refine_jax.errors import UserError
from refine_jax.quoting import reason
from refine_jax.target import Target
from refine_jax.training.flops import DEVICES

_GIB = 2**30
# What main.py lets XLA take of a GPU.
_GPU_SHARE = 0.92
# By NVIDIA's data sheets of H100 and H200 SXM and what CUDA says of the devices, in XLA's format.
_HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: BANDWIDTH
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: MEMORY
  device_address_bits: 64
  pcie_bandwidth: 64000000000
  ecc_enabled: true
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  platform_version: "Compute Capability 9.0a"
  device_vendor: "NVIDIA Corporation"
  name: "KIND"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "KIND"
"""


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of device.

  Attributes:
    platform, kind: as jax names them.
    memory: bytes that a process may take; None: not known.
    link: bytes/s that a device sends to its neighbours, all links together, one way.
    network: bytes/s that a device sends to other hosts; None: these are neighbours too.
    per_host: devices of a host.
  """

  platform: str
  kind: str
  memory: int | None
  link: float
  network: float | None = None
  per_host: int = 8


KINDS = {
  # NVLink takes 900 GB/s, both ways together; one port of 400 Gb/s a GPU leads to other hosts.
  "h100": Kind("gpu", "NVIDIA H100 80GB HBM3", int(_GPU_SHARE * 84942979072), 450e9, 50e9),
  "h200": Kind("gpu", "NVIDIA H200", int(_GPU_SHARE * 141e9), 450e9, 50e9),
  # Memory as libtpu counts it; links by cloud.google.com/tpu/docs/system-architecture-tpu-vm.
  "v4": Kind("tpu", "TPU v4", int(30.75 * _GIB), 300e9, per_host=4),
  "v5e": Kind("tpu", "TPU v5 lite", int(15.75 * _GIB), 200e9),
  "v5p": Kind("tpu", "TPU v5p", int(95.74 * _GIB), 600e9, per_host=4),
  "v6e": Kind("tpu", "TPU v6 lite", int(31.25 * _GIB), 400e9),
  "cpu": Kind("cpu", "cpu", None, 10e9),
}
_FORMS = "h100:8, v5e:2x4, v6e:4x4, v5p:2x2x2, v4:2x2x2 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Slice:
  """So many devices of one kind, as --device names them."""

  name: str
  kind: Kind
  sizes: tuple[int, ...]

  @property
  def count(self) -> int:
    result = 1
    for size in self.sizes:
      result *= size
    return result

  @property
  def target(self) -> Target:
    """What choices are made for."""
    return Target(self.kind.platform, self.kind.kind, self.kind.memory)

  @property
  def crosses_hosts(self) -> bool:
    """Whether some of the devices reach others through a slower network."""
    return self.kind.network is not None and self.count > self.kind.per_host


def parse(name: str) -> Slice:
  """Reads the name of a slice.

  Raises:
    UserError: it is none.
  """
  found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*))?", name)
  if not found or found[1] not in KINDS:
    raise UserError(f"--device={name!r} is not known; name one such as {_FORMS}.")
  kind = KINDS[found[1]]
  sizes = tuple(int(x) for x in found[2].split("x")) if found[2] else (1,)
  axes = {"gpu": 1, "cpu": 1}.get(kind.platform) or (2 if found[1] in ("v5e", "v6e") else 3)
  if sizes == (1,):
    sizes = (1,) * axes
  if len(sizes) != axes or not all(sizes):
    raise UserError(
      f"--device={name!r}: {found[1]} takes {'x'.join('ABC'[:axes])} devices; name one such as"
      f" {_FORMS}."
    )
  if kind.network and len(sizes) == 1 and sizes[0] > kind.per_host and sizes[0] % kind.per_host:
    raise UserError(
      f"--device={name!r}: more than {kind.per_host} of them are hosts of {kind.per_host} each;"
      f" name a multiple of {kind.per_host}."
    )
  return Slice(name, kind, sizes)


def prepare(wanted: Slice) -> None:
  """Sets what has to be known before JAX looks for its devices: that this process has a CPU."""
  config: Any = jax.config
  if config.jax_platforms != "cpu":
    config.update("jax_platforms", "cpu")
  # libtpu asks no metadata server who this host is, and other processes may use it too.
  told = {"SKIP_MDS_QUERY": "1", "WORKER_ID": "0", "WORKER_HOSTNAMES": "localhost"}
  for name, value in (told | {"ACCELERATOR_TYPE": "v5litepod-8"}).items():
    os.environ.setdefault(f"TPU_{name}", value)
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if wanted.kind.platform == "cpu":
    # Too late where JAX has looked already: then `find` counts those that there are.
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", wanted.count)


def find(wanted: Slice) -> Sequence[Any]:
  """The devices, of which none is here: programs can be compiled for them, and not run.

  Raises:
    UserError: what compiles for them is not installed, or knows no such slice.
  """
  platform = wanted.kind.platform
  if platform == "cpu":
    if len(jax.devices("cpu")) < wanted.count:
      raise UserError(f"--device={wanted.name!r}: this process has {len(jax.devices('cpu'))} CPUs.")
    return jax.devices("cpu")[: wanted.count]
  what = {"gpu": "JAX's CUDA plugin", "tpu": "libtpu"}[platform]
  if not is_installed(wanted):
    raise UserError(
      f"--device={wanted.name!r} needs {what}, which is not installed: pip install -e '.[plan]'."
    )
  try:
    if platform == "gpu":
      hosts = max(wanted.count // wanted.kind.per_host, 1)
      shape = f"1x{hosts}x{wanted.count // hosts}"
      return topologies.get_topology_desc(
        platform="cuda", target_config=_description(wanted), topology=shape
      ).devices
    # A single chip is one of the smallest slice.
    sizes = (2,) * min(len(wanted.sizes), 2) + (1,) * (len(wanted.sizes) - 2)
    sizes = sizes if wanted.count == 1 else wanted.sizes
    name = f"{wanted.name.partition(':')[0]}:{'x'.join(map(str, sizes))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[: wanted.count]
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise UserError(f"--device={wanted.name!r}: {what} refuses it ({reason(error)}).") from error


def _description(wanted: Slice) -> str:
  """A GPU's numbers as XLA's compiler reads them."""
  kind = wanted.kind
  assert kind.memory is not None
  bandwidth = next(d.bandwidth for d in DEVICES if d.kind in kind.kind)
  return (
    _HOPPER.replace("KIND", kind.kind)
    .replace("BANDWIDTH", f"{bandwidth:.0f}")
    .replace("MEMORY", f"{kind.memory / _GPU_SHARE:.0f}")
  )


@contextlib.contextmanager
def answering_for(wanted: Slice) -> Iterator[None]:
  """Has JAX compile for devices that are not here: it asks this process's, and keeps programs.

  Its packed attention and its kernels ask what the GPUs here are, of which there are none. Programs
  would go to the compilation cache, from which none for such devices can be read.
  """
  if wanted.kind.platform == "cpu":
    yield
    return
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  answers: list[tuple[Any, str, Any]] = [
    (cudnn, "check_compute_capability", lambda least: float(least) <= 9.0)
  ]
  with contextlib.suppress(ImportError):  # since jax 0.12
    gpu_info = importlib.import_module("jax._src.pallas.triton.gpu_info")
    answers.append((gpu_info, "get_device_kind", lambda: wanted.kind.kind))
  config: Any = jax.config
  seconds = config.jax_persistent_cache_min_compile_time_secs
  before = [(module, name, getattr(module, name)) for module, name, _ in answers]
  for module, name, answer in answers:
    setattr(module, name, answer)
  config.update("jax_persistent_cache_min_compile_time_secs", float(10**9))
  try:
    yield
  finally:
    for module, name, answer in before:
      setattr(module, name, answer)
    config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def is_installed(wanted: Slice) -> bool:
  """Whether what compiles for these devices is there (extra `plan`)."""
  packages = {"cpu": "jax", "gpu": "jax_plugins.xla_cuda13", "tpu": "libtpu"}
  try:
    return importlib.util.find_spec(packages[wanted.kind.platform]) is not None
  except ModuleNotFoundError:
    return False
