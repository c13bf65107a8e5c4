"""What a compiled step sends between devices: how often, and which arrays."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import train_fixtures as tiny

from refine_jax import sharding
from refine_jax.batch import Batch
from refine_jax.config import MeshConfig
from refine_jax.training.train_step import init_state, jit_train_step

# No size occurs twice: width 32, heads x head width 40, features 48, vocabulary 38.
CONFIG = tiny.tiny_config(head_dim=10, vocab_size=38)
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(accumulation=2, **axes) -> list[tuple[str, str, bool, str]]:
  """(kind, shapes of the result, whether it is in a loop, groups of devices) of each in a step."""
  mesh = sharding.make_mesh(MeshConfig(**axes))
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
  return read(step.lower(state, batch).compile().as_text())


def read(text) -> list[tuple[str, str, bool, str]]:
  bodies: dict[str, list[str]] = {}
  for line in text.splitlines():
    begin = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*-> .*{$", line)
    if begin:
      lines = bodies.setdefault(begin[1], [])
    elif bodies:
      lines.append(line)
  called = {
    name: set(re.findall(r"%([\w.-]+)", " ".join(x))) & bodies.keys() for name, x in bodies.items()
  }
  looped = {
    m for x in bodies.values() for m in re.findall(r" while\(.*body=%?([\w.-]+)", "\n".join(x))
  }
  while more := {m for name in looped for m in called[name]} - looped:
    looped |= more
  return [
    (found[2], found[1], name in looped, found[3])
    for name, x in bodies.items()
    for found in re.finditer(
      rf"= (.*?) ({KINDS})(?:-start)?\(.*?replica_groups=(mesh.*?}}|\S+),", "\n".join(x)
    )
  ]


def test_data_parallel_sums_gradients_once_a_step_whatever_the_turns():
  found = collectives(data=8)
  assert {kind for kind, *_ in found} == {"all-reduce"}
  assert not [x for x in found if x[2]]
  layers = [s for _, shapes, *_ in found for s in re.findall(r"\w+\[2,32,48\]", shapes)]
  assert len(layers) == 2  # gate and up, each once


def test_data_beside_other_axes_sums_gradients_once_a_step_too():
  found = collectives(data=2, fsdp=4)
  assert {groups for *_, looped, groups in found if looped} == {"[2,4]<=[8]"}  # within fsdp
  over_data = (  # as versions of XLA print it
    "{{0,4},{1,5},{2,6},{3,7}}",
    "mesh['data'=2,'fsdp'=4,'tensor'=1] {'data'}",
  )
  once = [x for x in found if x[0] == "all-reduce" and x[3] in over_data]
  assert re.findall(r"\w+\[2,8,48\]", str(once)) == ["f32[2,8,48]"] * 2  # gate and up


def test_tensor_parallel_moves_no_matrix_over_tensor():
  found = collectives(data=1, fsdp=4, tensor=2)
  sizes = {
    tuple(sorted(map(int, dims.split(","))))
    for _, shapes, *_ in found
    for dims in re.findall(r"\[(\d+,\d+)\]", shapes)
  }
  split = {(24, 32), (20, 32), (19, 32)}  # features, queries, vocabulary: half of each
  assert split <= sizes
  assert not sizes & {(32, 48), (32, 40), (32, 38)}
  activations = [x for x in found if x[0] == "all-reduce" and "[2,24,32]" in x[1]]
  assert len(activations) == 5  # two a layer each way, and that of the head
