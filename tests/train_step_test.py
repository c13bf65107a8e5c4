"""The step: what must not change its result, and what it must never do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny
from jax.sharding import NamedSharding, PartitionSpec

from refine_jax import sharding
from refine_jax.config import MeshConfig
from refine_jax.objective import noise
from refine_jax.training.train_step import eval_step, init_state, jit_train_step


def run(batch, step_config, forward, steps=1, params=None):
  """The state and the metrics of each step, for arrays [A, B, T]."""
  state = init_state(params or tiny.tiny_params(forward.model), step_config.optim)
  step = jit_train_step(step_config, forward)
  history = []
  for _ in range(steps):
    state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return state, history


def gradient(batch, step_config, forward, params=None):
  """The gradient of one [B, T] batch, and the round sums."""
  params = params or tiny.tiny_params(forward.model)
  batch, noised = noise.add_noise(
    jax.random.key(0), batch, step_config.noise, step_config.noise_token
  )
  objective = step_config.objective
  return tiny.gradients_of_rounds(
    forward, params, batch, noised, objective.loss_weights, objective.clean_weight
  )


def assert_close(a, b, atol=1e-5, rtol=1e-4):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=rtol), a, b)


@pytest.mark.parametrize(
  "head_gradient,kind", [("forward", "uniform"), ("recompute", "uniform"), ("forward", "block")]
)
def test_packed_rows_give_the_gradient_of_unpacked_ones(head_gradient, kind):
  step_config = tiny.step_config(kind=kind, clean_weight=0.5 * (kind == "block"))
  forward = tiny.forward(head_gradient=head_gradient)
  packed = gradient(tiny.packed_batch(), step_config, forward)
  unpacked = gradient(tiny.unpacked_batch(), step_config, forward)
  assert_close(packed, unpacked)


def test_micro_batches_give_the_step_of_one_batch():
  # Adam divides a gradient by its own size. Where the gradient is rounding alone, so is
  # the quotient; a larger eps keeps it as exact as the gradient.
  batch, step_config, forward = tiny.packed_batch(24), tiny.step_config(eps=1e-3), tiny.forward()
  one, (one_metrics,) = run(tiny.split(batch, 1), step_config, forward)
  four, (four_metrics,) = run(tiny.split(batch, 4), step_config, forward)
  assert_close(one_metrics, four_metrics)
  assert_close(one.opt_state, four.opt_state)
  assert_close(one.params, four.params)


@pytest.mark.parametrize(
  "sizes,kind",
  [((8, 1, 1), "block"), ((1, 8, 1), "uniform"), ((2, 2, 2), "block"), ((1, 4, 2), "uniform")],
)
def test_eight_devices_take_the_step_of_one(sizes, kind):
  batch, forward = tiny.split(tiny.packed_batch(48), 2), tiny.forward()
  step_config = tiny.step_config(kind=kind, clean_weight=0.5 * (kind == "block"))
  one, (want,) = run(batch, step_config, forward)
  mesh = sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
  params = tiny.tiny_params()
  state = jax.device_put(
    init_state(params, step_config.optim),
    sharding.shardings(init_state(params, step_config.optim), mesh),
  )
  places = sharding.shardings(state, mesh)
  step = jit_train_step(step_config, dataclasses.replace(forward, mesh=mesh), places)
  state, metrics = step(state, sharding.put_batch(batch, mesh, accumulated=True))
  assert_close(jax.device_get(metrics), want)
  assert_close(jax.device_get(state.params), jax.device_get(one.params))
  kernel = state.opt_state[1].mu["layers"]["mlp"]["up"]["kernel"]
  spec = [None, "fsdp" if sizes[1] > 1 else None, "tensor" if sizes[2] > 1 else None]
  wanted = NamedSharding(mesh, PartitionSpec(*spec))
  assert kernel.sharding.is_equivalent_to(wanted, 3)


def test_the_step_compiles_once():
  batch, step_config, forward = (
    tiny.split(tiny.packed_batch(), 1),
    tiny.step_config(),
    tiny.forward(),
  )
  step = jit_train_step(step_config, forward)
  state = init_state(tiny.tiny_params(), step_config.optim)
  for seed in range(3):
    state, _ = step(state, tiny.split(tiny.packed_batch(seed=seed), 1))
  del batch
  assert step._cache_size() == 1


@pytest.mark.parametrize("remat", ["save_attention_mlp", "save_attention", "full"])
def test_what_is_recomputed_does_not_change_the_gradient(remat):
  batch, step_config = tiny.packed_batch(), tiny.step_config()
  want = gradient(batch, step_config, tiny.forward())
  got = gradient(batch, step_config, tiny.forward(remat=remat, unroll=2))
  assert_close(got, want)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
  batch, step_config, forward = (
    tiny.split(tiny.packed_batch(), 1),
    tiny.step_config(),
    tiny.forward(),
  )
  params = tiny.tiny_params()
  params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(jnp.inf)
  before = jax.device_get(params)
  state, history = run(batch, step_config, forward, steps=2, params=params)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
  assert [m["skipped_in_row"] for m in history] == [1, 2]
  assert int(state.step) == 2 and int(state.opt_state[1].count) == 0


def test_a_good_step_resets_the_count_in_a_row():
  batch, step_config, forward = (
    tiny.split(tiny.packed_batch(), 1),
    tiny.step_config(),
    tiny.forward(),
  )
  state = init_state(tiny.tiny_params(), step_config.optim)
  state = state.replace(skipped=jnp.int32(2), skipped_in_row=jnp.int32(2))
  state, metrics = jit_train_step(step_config, forward)(state, batch)
  assert (metrics["skipped"], metrics["skipped_in_row"]) == (2, 0)


def test_learning_lowers_every_rounds_loss():
  batch, forward = tiny.split(tiny.packed_batch(), 1), tiny.forward()
  step_config = dataclasses.replace(tiny.step_config(lr=1e-2, warmup_ratio=0.0), total_steps=60)
  _, history = run(batch, step_config, forward, steps=60)
  first, last = (
    np.array([m["terms"][term.name]["loss"] for term in step_config.plan])
    for m in (history[0], history[-1])
  )
  assert np.all(last < 0.5 * first), (first, last)


def test_bfloat16_compute_is_near_float32():
  batch, step_config = tiny.packed_batch(), tiny.step_config(num_iterations=1)
  want, _ = gradient(batch, step_config, tiny.forward())
  forward = tiny.forward(dtype="bfloat16")
  params = forward.cast(tiny.tiny_params())
  got, _ = gradient(batch, step_config, forward, params)
  flat = lambda t: np.concatenate([np.ravel(np.float32(x)) for x in jax.tree.leaves(t)])  # noqa: E731
  error = np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want))
  assert error < 0.06, error


def test_rounds_add_no_memory():
  batch, forward = tiny.split(tiny.packed_batch(24), 1), tiny.forward()

  def temporary_bytes(rounds):
    step_config = tiny.step_config(num_iterations=rounds)
    state = init_state(tiny.tiny_params(), step_config.optim)
    compiled = jit_train_step(step_config, forward).lower(state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(4) <= 1.02 * temporary_bytes(2)


def test_evaluation_sums_do_not_depend_on_packing_and_cover_everything():
  step_config, forward = tiny.step_config(), tiny.forward()
  params = tiny.tiny_params()
  packed = eval_step(params, tiny.packed_batch(), step_config=step_config, forward=forward)
  unpacked = eval_step(params, tiny.unpacked_batch(), step_config=step_config, forward=forward)
  assert_close(packed, unpacked)
  responses = sum(len(r) for _, r in tiny.examples(12))
  clean, block = packed["terms"]["clean"], packed["block"]
  for term in step_config.plan:
    sums = packed["terms"][term.name]
    np.testing.assert_allclose(sums["count"].sum(), responses)
    np.testing.assert_allclose(sums["corrupted"] + sums["clean"], sums["count"])
  assert clean["count"] == clean["clean"] == responses and block["blocks"] == 12
