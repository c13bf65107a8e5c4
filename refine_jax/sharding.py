"""The mesh, and where each array lives on it.

Rows of a batch are split over ("data", "fsdp"); parameters over "fsdp" and "tensor" by a table
of name patterns, which covers the optimizer's moments too, as their names end alike.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from refine_jax.batch import Batch
from refine_jax.config import MeshConfig, OptimConfig
from refine_jax.errors import UserError
from refine_jax.tree import leaf_name

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# First match wins. Column-parallel matrices split their outputs over "tensor", row-parallel ones
# their inputs (arXiv:1909.08053); the other side goes to "fsdp". "layers/" leaves carry a leading
# layer axis, which is never split: the scan runs over it.
_RULES = (
  (r"layers/.*(query|key|value|gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
  (r"layers/.*(output|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
  (r"layers/.*(query|key|value|gate|up)/bias$", PartitionSpec(None, "tensor")),
  # An adapter's factors, split as the side of the matrix that they share.
  (r"layers/.*(query|key|value|gate|up)/a$", PartitionSpec(None, "fsdp", None)),
  (r"layers/.*(query|key|value|gate|up)/b$", PartitionSpec(None, None, "tensor")),
  (r"layers/.*(output|down)/a$", PartitionSpec(None, "tensor", None)),
  (r"layers/.*(output|down)/b$", PartitionSpec(None, None, "fsdp")),
  (r"(embedding|head)$", PartitionSpec("tensor", "fsdp")),
)


def make_mesh(config: MeshConfig, devices: Sequence | None = None) -> Mesh:
  """A ("data", "fsdp", "tensor") mesh over all devices (or those given).

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  known = int(np.prod([s for s in sizes if s != -1]))
  asked = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
  if known > len(devices):
    raise UserError(
      f"config.mesh ({asked}) needs {known} devices and there are {len(devices)}; lower it."
    )
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  elif -1 in sizes or known != len(devices):
    # A mesh on some of the devices is allowed on one host: a user may want fewer.
    if -1 in sizes or jax.process_count() > 1:
      raise UserError(
        f"config.mesh ({asked}) does not fit {len(devices)} devices; sizes must multiply to that."
      )
    devices = devices[:known]
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_fit(mesh: Mesh, optim: OptimConfig, heads: int, kv_heads: int, max_length: int) -> None:
  """Raises UserError where the batch or the model cannot be split over the mesh."""
  micro, shards = optim.batch_size // optim.accumulation, batch_shards(mesh)
  if micro % shards:
    raise UserError(
      f"config.optim.batch_size={optim.batch_size} in {optim.accumulation} micro-batches gives"
      f" {micro} rows each, not divisible by the mesh's data x fsdp = {shards}."
    )
  tensor = mesh.shape["tensor"]
  sizes = {"key/value heads": kv_heads, "heads": heads, "data.max_length": max_length}
  for name, size in sizes.items():
    if size % tensor:
      raise UserError(
        f"config.mesh.tensor={tensor} does not divide the model's {name} ({size}); lower it."
      )


def shardings(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for each leaf of a tree of arrays or shapes, by the table above.

  An axis that does not divide its dimension is dropped; scalars and norms are replicated.
  """

  def leaf(path, x):
    name = leaf_name(path)
    spec = next((s for pattern, s in _RULES if re.search(pattern, name)), PartitionSpec())
    if len(spec) > x.ndim:
      spec = PartitionSpec()
    parts = [
      axis if axis is None or size % mesh.shape[axis] == 0 else None
      for axis, size in zip(spec, x.shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*parts))

  return jax.tree_util.tree_map_with_path(leaf, tree)


def batch_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
  """For arrays [A, B, T] (accumulated) or [B, T]: rows over data and fsdp."""
  spec = PartitionSpec(None, BATCH_AXES) if accumulated else PartitionSpec(BATCH_AXES)
  return NamedSharding(mesh, spec)


def put_batch(batch: Batch, mesh: Mesh, *, accumulated: bool) -> Batch:
  """This process's rows (numpy, [A, B_local, T] or [B_local, T]) as global device arrays."""
  sharding = batch_sharding(mesh, accumulated=accumulated)
  return batch.map(lambda x: jax.make_array_from_process_local_data(sharding, x))
