"""What a compiled step sends between devices: how often, which arrays, how many bytes.

The same is asked of programs for a CPU and, where JAX's CUDA plugin is installed, of those that
XLA makes for eight H100s.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import train_fixtures as tiny

from refine_jax import sharding
from refine_jax.batch import Batch
from refine_jax.config import MeshConfig
from refine_jax.planning import collectives as reader
from refine_jax.planning import devices
from refine_jax.training import choices
from refine_jax.training.train_step import init_state, jit_train_step

# No size occurs twice: width 32, heads x head width 40, features 48, vocabulary 38.
CONFIG = tiny.tiny_config(head_dim=10, vocab_size=38)
TURNS = 2 * 2  # micro-batches and rounds


@pytest.fixture(scope="module", params=["cpu:8", "h100:8"])
def collectives(request):
  """A function: sizes of the mesh's axes -> the collectives of a step."""
  wanted = devices.parse(request.param)
  if not devices.is_installed(wanted):
    pytest.skip("JAX's CUDA plugin, of the extra `plan`, is not installed")
  return functools.cache(functools.partial(compiled, wanted))


def compiled(wanted, accumulation=2, **axes) -> list[reader.Collective]:
  mesh = sharding.make_mesh(MeshConfig(**axes), devices.find(wanted))
  step_config, forward = tiny.step_config(), tiny.forward(CONFIG, mesh=mesh)
  shapes = jax.eval_shape(lambda: init_state(tiny.tiny_params(CONFIG), step_config.optim))
  places = sharding.shardings(shapes, mesh)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
  )
  rows = sharding.batch_sharding(mesh, accumulated=True)
  ids = jax.ShapeDtypeStruct((accumulation, 8, 24), jnp.int32, sharding=rows)
  mask = jax.ShapeDtypeStruct(ids.shape, bool, sharding=rows)
  batch = Batch(ids, ids, ids, response_mask=mask, example_ids=ids)
  step = jit_train_step(step_config, dataclasses.replace(forward, mesh=mesh), places)
  with devices.answering_for(wanted):
    return reader.read(step.lower(state, batch).compile().as_text())


def shapes_of(found) -> list[tuple]:
  return [shape for one in found for _, shape in one.arrays]


def parameter_bytes(**axes) -> int:
  """Of a device."""
  mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:8])
  params = jax.eval_shape(lambda: tiny.tiny_params(CONFIG))
  return choices.bytes_per_device(params, sharding.shardings(params, mesh))


def test_data_parallel_sums_gradients_once_a_step_whatever_the_turns(collectives):
  found = collectives(data=8)
  assert {one.kind for one in found} == {"all-reduce"}
  assert not [one for one in found if one.looped]
  # Each gradient once, and a few sums of metrics.
  size = parameter_bytes(data=8)
  assert size <= sum(one.total for one in found) <= 1.02 * size


def test_data_beside_other_axes_sums_gradients_once_a_step_too(collectives):
  found = collectives(data=2, fsdp=4)
  within = ((0, 1, 2, 3), (4, 5, 6, 7))
  assert {one.groups for one in found if one.looped and one.groups} == {within}
  across = ((0, 4), (1, 5), (2, 6), (3, 7))
  once = [one for one in found if one.kind == "all-reduce" and one.groups == across]
  size = parameter_bytes(data=2, fsdp=4)
  assert size <= sum(one.total for one in once) <= 1.05 * size


@pytest.mark.parametrize("collectives", ["h100:8"], indirect=True)  # XLA for CPUs scatters no sums
def test_fsdp_gathers_and_scatters_a_layer_at_a_time_and_sums_no_matrix_whole(collectives):
  found = collectives(data=1, fsdp=8)
  width, queries, keys, features = 32, 40, 20, 48
  layer = 4 * width * (2 * queries + 2 * keys + 3 * features)
  passes = CONFIG.layers * TURNS

  def bytes_of(kind):
    return sum(x.total for x in found if x.kind == kind and x.runs == passes)

  assert bytes_of("all-gather") == 2 * passes * layer  # forward and backward
  assert bytes_of("reduce-scatter") == passes * layer // 8
  # Norms, biases and the loss: less than the smallest matrix.
  summed = [x.bytes for x in found if x.kind == "all-reduce"]
  assert summed and max(summed) < 4 * width * keys


def test_tensor_parallel_moves_no_matrix_over_tensor(collectives):
  found = collectives(data=1, fsdp=4, tensor=2)
  sizes = {tuple(sorted(shape)) for shape in shapes_of(found) if len(shape) == 2}
  split = {(24, 32), (20, 32), (19, 32)}  # features, queries, vocabulary: half of each
  assert split <= sizes
  assert not sizes & {(32, 48), (32, 40), (32, 38)}
  activations = [x for x in found if x.kind == "all-reduce" and (2, 24, 32) in shapes_of([x])]
  assert len(activations) == 5  # two a layer each way, and that of the head
  assert {x.runs for x in activations} == {CONFIG.layers * TURNS, TURNS}
