"""The mesh, and where each array lives on it.

Rows of a batch are split over ("data", "fsdp"); parameters over "fsdp" and "tensor" by a table
of name patterns, which covers the optimizer's moments too, as their names end alike.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from refine_jax.batch import Batch
from refine_jax.config import MeshConfig, OptimConfig
from refine_jax.errors import UserError
from refine_jax.quoting import reason
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
    UserError: the sizes do not multiply to the number of devices, or no layout is known for them.
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
  return Mesh(_layout(sizes, devices, asked), AXES, axis_types=(AxisType.Auto,) * 3)


def tensor_mesh(devices: Sequence) -> Mesh:
  """A mesh of these devices along "tensor" alone."""
  return make_mesh(MeshConfig(data=1, fsdp=1, tensor=len(devices)), devices)


def _layout(sizes: list[int], devices: Sequence, asked: str) -> np.ndarray:
  """The devices in the order of a mesh: neighbours on an axis are neighbours of the network."""
  kind = devices[0].device_kind
  # Topologies that are compiled for ahead of time have no index: they are one slice.
  tpu = devices[0].platform == "tpu"
  slices = len({getattr(d, "slice_index", 0) for d in devices}) if tpu else 1
  try:
    # An axis may be no product of the network's own axes, as 8 on a torus of 4 x 4.
    if slices == 1:
      return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
      raise ValueError(f"{slices} slices take equal parts of mesh.data={sizes[0]}")
    # Between TPU slices there is a slower network, for "data" alone.
    within, between = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1]
    return mesh_utils.create_hybrid_device_mesh(
      within, between, devices, allow_split_physical_axes=True
    )
  except (NotImplementedError, ValueError, AssertionError) as error:
    raise UserError(
      f"config.mesh ({asked}) cannot be laid out on {len(devices)} x {kind} ({reason(error)});"
      " choose other sizes."
    ) from error


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
    if name.startswith("layers/") and len(spec) == x.ndim + 1:
      spec = PartitionSpec(*spec[1:])  # a layer by itself
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


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """Which of so many rows of a batch this process's devices hold: int [B_local], ascending.

  Several processes hold the same rows where "tensor" reaches over them.
  """
  places = batch_sharding(mesh, accumulated=False).addressable_devices_indices_map((rows,))
  held = [np.arange(rows)[index] for index in places.values()]
  return np.unique(np.concatenate(held))


def put_batch(batch: Batch, mesh: Mesh, *, accumulated: bool, rows: int | None = None) -> Batch:
  """The rows that this process holds (numpy, [A, B_local, T] or [B_local, T]) as global arrays.

  Args:
    rows: B, of the global batch, of which these are `local_rows`; None: these are all of them.

  Raises:
    ValueError: they are not as many.
  """
  sharding, axis = batch_sharding(mesh, accumulated=accumulated), int(accumulated)
  held = np.arange(batch.ids.shape[axis]) if rows is None else local_rows(mesh, rows)
  if len(held) != batch.ids.shape[axis]:
    raise ValueError(f"{batch.ids.shape[axis]} rows are not the {len(held)} that are held here")
  count = len(held) if rows is None else rows

  def put(x):
    def part(index):
      mine = np.searchsorted(held, np.arange(count)[index[axis]])
      return np.take(x, mine, axis=axis)

    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)

  return batch.map(put)


def pinned(x: jax.Array, kind: str, mesh: Mesh | None) -> jax.Array:
  """The model's Constrain (model/layer.py): heads and features over tensor, as their matrices are.

  Rows are over data and fsdp.
  """
  if mesh is None or mesh.size == 1:
    return x
  tensor = mesh.shape["tensor"]
  if kind != "residual" and (tensor == 1 or x.shape[2] % tensor):
    return x
  inner = {"residual": (None,), "heads": ("tensor", None), "features": ("tensor",)}[kind]
  place, spec = left(mesh, PartitionSpec(BATCH_AXES, None, *inner))
  return jax.lax.with_sharding_constraint(x, NamedSharding(place, spec))


def on_each_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
  """jax.shard_map over all axes of the mesh, or over those left inside of another one.

  check_vma is off because custom kernels do not say over which axes their outputs vary.
  """
  place, specs = left(mesh, (in_specs, out_specs))
  axes = set(mesh.axis_names) - _split_around()
  return jax.shard_map(
    function,
    mesh=place,
    in_specs=specs[0],
    out_specs=specs[1],
    axis_names=axes,
    check_vma=False,
  )


def left(mesh: Mesh, specs: Any) -> tuple[Any, Any]:
  """The mesh, and PartitionSpecs, without axes over which a jax.shard_map around us has split."""
  manual = _split_around()
  if not manual:
    return mesh, specs

  def without(part):
    kept = tuple(a for a in ((part,) if isinstance(part, str) else part or ()) if a not in manual)
    return kept or None

  def leaf(spec):
    return PartitionSpec(*map(without, spec))

  around = jax.sharding.get_abstract_mesh()
  return around, jax.tree.map(leaf, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _split_around() -> set:
  """Axes over which a jax.shard_map around us has split."""
  around = jax.sharding.get_abstract_mesh()
  return set() if around.empty else set(around.manual_axes)


def replicated(mesh: Mesh) -> NamedSharding:
  """For what every device holds whole, and so every process can read."""
  return NamedSharding(mesh, PartitionSpec())
