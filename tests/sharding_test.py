"""Where rows and devices lie: which rows a process holds, and meshes on networks of any shape."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from refine_jax import sharding
from refine_jax.batch import Batch
from refine_jax.config import MeshConfig
from refine_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the layout of a mesh asks of a TPU chip."""

  id: int
  coords: tuple[int, int, int]
  process_index: int
  device_kind: str = "TPU v6 lite"
  platform: str = "tpu"
  core_on_chip: int = 0
  slice_index: int = 0


def torus(x, y, slices=1) -> list[Chip]:
  """x times y chips in hosts of 2 x 2, so many times."""
  places = itertools.product(range(slices), range(y), range(x))
  return [
    Chip(i, (a, b, 0), s * x * y // 4 + (b // 2) * (x // 2) + a // 2, slice_index=s)
    for i, (s, b, a) in enumerate(places)
  ]


def layout(devices, **sizes):
  """The mesh's devices as an array, without a Mesh, which takes real devices only."""
  made = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "Mesh", lambda devices, axes, axis_types: made.append(devices))
    sharding.make_mesh(MeshConfig(**sizes), devices)
  return made[0]


@pytest.mark.parametrize("fsdp, tensor", [(8, 2), (2, 8), (4, 4), (16, 1)])
def test_a_mesh_whose_axes_are_not_those_of_the_network_is_laid_out(fsdp, tensor):
  devices = torus(4, 4)
  got = layout(devices, data=1, fsdp=fsdp, tensor=tensor)
  assert got.shape == (1, fsdp, tensor) and {d.id for d in got.flat} == set(range(16))


def test_several_slices_split_data_alone():
  got = layout(torus(2, 2, slices=2), data=2, fsdp=2, tensor=2)
  assert [{d.slice_index for d in part.flat} for part in got] == [{0}, {1}]
  with pytest.raises(
    UserError, match=r"data=1 x fsdp=4 x tensor=2\) cannot be laid out on 8 x TPU"
  ):
    layout(torus(2, 2, slices=2), data=1, fsdp=4, tensor=2)


def test_chips_with_a_hole_between_them_are_the_users_error():
  with pytest.raises(UserError, match="cannot be laid out on 12 x TPU v6 lite"):
    layout([c for c in torus(4, 4) if c.id % 5], data=1, fsdp=12, tensor=1)


def test_put_batch_puts_each_row_where_the_mesh_has_it_whatever_the_order_of_devices():
  devices = np.array(jax.devices())[[0, 5, 2, 7, 4, 1, 6, 3]].reshape(2, 2, 2)
  mesh = jax.sharding.Mesh(devices, sharding.AXES)
  ids = np.arange(2 * 8 * 3, dtype=np.int32).reshape(2, 8, 3)
  batch = Batch(*[ids] * 4, example_ids=ids)
  np.testing.assert_array_equal(sharding.local_rows(mesh, 8), np.arange(8))
  got = sharding.put_batch(batch, mesh, accumulated=True, rows=8)
  assert got.ids.sharding == sharding.batch_sharding(mesh, accumulated=True)
  np.testing.assert_array_equal(got.ids, ids)
  with pytest.raises(ValueError, match="8 rows are not the 16"):
    sharding.put_batch(batch, mesh, accumulated=True, rows=16)
