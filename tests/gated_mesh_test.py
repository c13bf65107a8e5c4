"""A gated adapter on several devices: the numbers of one, and each device its own part."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import train_fixtures as tiny

from refine_jax import sharding
from refine_jax.attention import ranged, ranged_triton
from refine_jax.config import MeshConfig
from refine_jax.model import adapters, draft_head
from refine_jax.training import gradients

ADAPTER = adapters.Adapter(kind="gated", rank=4, alpha=8.0)


def make_mesh():
  return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def random_factors(config):
  factors = adapters.init_params(config, ADAPTER, jax.random.key(1))
  return jax.tree.map(
    lambda x: 0.2 * jax.random.normal(jax.random.key(x.shape[-1]), x.shape), factors
  )


def test_eight_devices_give_the_loss_and_gradient_of_one():
  config = tiny.tiny_config(**tiny.GEMMA3)
  step_config = tiny.step_config(num_iterations=1, kind="block")
  noise = dataclasses.replace(step_config.noise, anchors=3, random=True)
  step_config = dataclasses.replace(step_config, noise=noise, gated=True)
  batch, key = tiny.split(tiny.packed_batch(24), 2), jax.random.key(4)
  params, factors = tiny.params_with_biases(config), random_factors(config)

  def run(mesh, batch, params, factors):
    forward = tiny.forward(config, adapter=ADAPTER, mesh=mesh)
    frozen = jax.jit(forward.freeze)(params)

    @jax.jit
    def gradient(factors, batch, frozen):
      return gradients.of_drafts(factors, batch, frozen, key, step_config, forward)

    return frozen, gradient(factors, batch, frozen)

  _, want = run(None, batch, params, factors)
  mesh = make_mesh()
  places = [sharding.shardings(x, mesh) for x in (params, factors)]
  split = sharding.put_batch(batch, mesh, accumulated=True)
  frozen, got = run(mesh, split, *map(jax.device_put, (params, factors), places))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), got, want)
  for x, place in zip(jax.tree.leaves(frozen), jax.tree.leaves(places[0]), strict=True):
    assert place.is_equivalent_to(x.sharding, x.ndim)


def test_lora_on_data_parallel_devices_gives_the_gradient_of_one():
  config, adapter = tiny.tiny_config(), dataclasses.replace(ADAPTER, kind="lora")
  batch, key = tiny.split(tiny.packed_batch(24), 2), jax.random.key(4)
  params, factors = tiny.params_with_biases(config), random_factors(config)

  def run(mesh, batch):
    forward = tiny.forward(config, adapter=adapter, mesh=mesh)
    base = jax.jit(forward.freeze)(params)
    of_rounds = functools.partial(
      gradients.of_rounds, step_config=tiny.step_config(), forward=forward
    )
    return jax.jit(of_rounds)(factors, batch, base, key)

  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=1, tensor=1), jax.devices()[:4])
  want, got = run(None, batch), run(mesh, sharding.put_batch(batch, mesh, accumulated=True))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), got, want)


def test_each_device_scores_its_own_drafts():
  keys = jax.random.split(jax.random.key(0), 3)
  x, clean = (jax.random.normal(k, (8, 9, 16)) for k in keys[:2])
  head = jax.random.normal(keys[2], (101, 16))
  targets, weights = jnp.zeros((8, 9), int), jnp.asarray(np.arange(72).reshape(8, 9) % 3, float)

  def compiled(mesh):
    def loss(x, clean, head):
      return draft_head.draft_loss(x, clean, head, targets, weights, mesh=mesh)[0]

    arguments = (x, clean, head)
    if mesh is not None:
      rows = sharding.batch_sharding(mesh, accumulated=False)
      places = sharding.shardings({"head": head}, mesh)["head"]
      arguments = jax.device_put(arguments, (rows, rows, places))
    run = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return run(*arguments), run.cost_analysis()["flops"]

  want, whole = compiled(None)
  got, part = compiled(make_mesh())
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), got, want)
  assert part < whole / 4


def test_the_kernel_of_draft_blocks_takes_the_rows_and_heads_of_a_device(monkeypatch):
  shapes, attend = [], functools.partial(ranged_triton.attend, interpret=True)

  def spy(q, *arguments, **options):
    shapes.append(q.shape)
    return attend(q, *arguments, **options)

  monkeypatch.setattr(ranged_triton, "attend", spy)
  keys = jax.random.split(jax.random.key(0), 5)
  q = jax.random.normal(keys[0], (4, 12, 4, 8))
  k, v = (jax.random.normal(x, (4, 12, 2, 8)) for x in keys[1:3])
  clean = tuple(jax.random.normal(x, (4, 70, 2, 8)) for x in keys[3:])
  columns = jnp.tile(jnp.arange(12) * 5, (4, 1))
  first, end = columns // 20 * 10, columns // 3

  def run(implementation, mesh):
    with_window = ranged.attend_with(
      first, end, columns, block=4, implementation=implementation, mesh=mesh
    )

    def loss(q, k, v):
      out, _ = with_window(25)(q, k, v, clean)
      return jnp.sum(jnp.sin(out))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

  want, got = run("xla", None), run("kernel", make_mesh())
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), got, want)
  assert set(shapes) == {(1, 12, 2, 8)}
