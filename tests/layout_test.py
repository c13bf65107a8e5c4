"""Forms of the parameters: the same function, and back again without loss."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny

from refine_jax import sharding
from refine_jax.attention import packed
from refine_jax.config import MeshConfig
from refine_jax.decoding import loading
from refine_jax.model import layout, transformer
from refine_jax.model import remat as remat_lib
from refine_jax.training import forward as forward_lib
from refine_jax.training import memory
from refine_jax.training.train_step import init_state, jit_train_step

FAMILIES = {
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qkv_bias": False, "qk_norm": True},
  "biases": {"mlp_bias": True, "output_bias": True, "windows": (None, 3)},
  "gemma3": tiny.GEMMA3,
}
FORMS = {
  "apart": layout.unstack_layers,
  "joined": layout.join_projections,
  "joined mlp": lambda p: layout.join_projections(p, ("mlp",)),
  "apart and joined": lambda p: layout.join_projections(layout.unstack_layers(p)),
}


@pytest.fixture(params=FAMILIES)
def config(request):
  return tiny.tiny_config(**FAMILIES[request.param])


def random_params(config):
  """With biases that are not zero and scales that are not one."""
  params = tiny.tiny_params(config)
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
  return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


def assert_trees(compare, got, want, **tolerance):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: compare(a, b, **tolerance), got, want)


def states_and_gradients(config, params, **options):
  batch = tiny.packed_batch()

  def run(params):
    x_BTD = transformer.hidden_states(
      params,
      config,
      batch,
      packed.for_batch(batch, max_segments=3),
      **options,
    )
    return jnp.sum(jnp.sin(x_BTD)), x_BTD

  (_, x_BTD), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
  return x_BTD, gradients


@functools.cache
def canonical_states(config):
  """Random parameters in the canonical form, and what the model makes of them."""
  params = random_params(config)
  return params, *states_and_gradients(config, params)


@pytest.mark.parametrize("form", FORMS)
def test_back_again_is_exact(config, form):
  params = random_params(config)
  assert_trees(np.testing.assert_array_equal, layout.canonical(FORMS[form](params), config), params)
  assert_trees(np.testing.assert_array_equal, layout.canonical(params, config), params)


def assert_near(got, want):
  assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize(
  ("form", "remat"),
  [("joined", "full"), ("apart", "none"), ("apart and joined", "save_attention_mlp")],
)
def test_forms_compute_the_same(config, form, remat):
  params, want, want_gradients = canonical_states(config)
  got, gradients = states_and_gradients(config, FORMS[form](params), remat=remat)
  assert_near(got, want)
  assert_trees(assert_near, layout.canonical(gradients, config), want_gradients)


def test_joined_layers_take_fewer_products_and_recompute_them():
  config = tiny.tiny_config()
  forward = {"apart": 9, "apart and joined": 6}  # attention's two among them
  for form, count in forward.items():
    params = FORMS[form](tiny.tiny_params(config))
    for remat, again in (("none", 0), ("full", count - 1)):  # "down" again has no use
      run = jax.jit(lambda p, remat=remat: states_and_gradients(config, p, remat=remat)[1])
      lowered = run.lower(params)
      assert lowered.compile().as_text().count(" dot(") == config.layers * (3 * count + again)
      # One a layer keeps the backward pass in order; without another a GPU's compiler may merge
      # the second pass with the first.
      barriers = lowered.as_text().count("optimization_barrier")
      assert barriers == config.layers * (2 if again else 1)


def test_weights_gradients_may_be_late_by_as_many_layers_as_asked():
  config = tiny.tiny_config(layers=3, windows=(None,) * 3)
  params = layout.unstack_layers(tiny.tiny_params(config))
  for slack in (0, 1, 3):
    run = jax.jit(lambda p, slack=slack: states_and_gradients(config, p, backward_slack=slack)[1])
    text = run.lower(params).as_text()
    assert text.count("optimization_barrier") == max(config.layers - slack, 0)


def step_on(mesh, batch, step_config, forward):
  """(new state, metrics) of one step, the state split as the mesh wants it."""
  state = init_state(tiny.tiny_params(forward.model), step_config.optim)
  places = sharding.shardings(state, mesh)
  step = jit_train_step(step_config, dataclasses.replace(forward, mesh=mesh), places)
  new, metrics = step(
    jax.device_put(state, places), sharding.put_batch(batch, mesh, accumulated=True)
  )
  for x, place in zip(jax.tree.leaves(new), jax.tree.leaves(places), strict=True):
    assert place.is_equivalent_to(x.sharding, x.ndim)
  return jax.device_get((new, metrics))


@functools.cache
def step_on_one_device():
  """What is compared with: a batch, a recipe, and the step with stacked layers."""
  # Adam divides by the gradient's size: eps keeps rounding small where that is next to nothing.
  batch, step_config = tiny.split(tiny.packed_batch(24), 2), tiny.step_config(eps=1e-5)
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  return batch, step_config, step_on(mesh, batch, step_config, tiny.forward())


# Where matrices are split over devices, startup.choose_forward joins none.
@pytest.mark.parametrize(
  ("sizes", "join"),
  [
    ((1, 1, 1), layout.MODULES),
    ((4, 1, 1), ("attention",)),
    ((2, 2, 1), ()),
    ((1, 2, 2), ()),
  ],
)
def test_the_step_is_the_same_with_layers_apart(sizes, join):
  batch, step_config, want = step_on_one_device()
  axes = dict(zip(sharding.AXES, sizes, strict=True))
  mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(sizes))])
  apart = tiny.forward(unroll=2, join=join, remat="save_attention_mlp")
  assert isinstance(apart.cast(tiny.tiny_params())["layers"], list)
  got = step_on(mesh, batch, step_config, apart)
  assert_trees(np.testing.assert_allclose, got, want, atol=1e-5, rtol=1e-4)


def test_older_names_of_policies_are_taken_with_a_warning(caplog):
  choose = functools.partial(
    memory.choose_remat,
    config=tiny.tiny_config(),
    dtype="float32",
    tokens=1,
    parameters=1,
    head_chunk=1,
    memory=None,
  )
  assert choose("mlp") == "save_attention_mlp"
  assert "remat 'mlp' is called 'save_attention_mlp' now." in caplog.text
  assert choose("attention") == "save_attention"
  caplog.clear()
  assert [choose(name) for name in remat_lib.POLICIES] == list(remat_lib.POLICIES)
  assert not caplog.records and set(remat_lib.ALIASES.values()) < set(remat_lib.POLICIES)


def test_what_recomputes_all_keeps_the_scan(monkeypatch):
  assert forward_lib.choose_unroll(3, "full", 28) == 3
  assert forward_lib.choose_unroll(0, "save_attention_mlp", 28) == 1  # a CPU
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  chosen = {name: forward_lib.choose_unroll(0, name, 28) for name in remat_lib.POLICIES}
  assert chosen == {"none": 28, "save_attention_mlp": 28, "save_attention": 28, "full": 1}


def test_what_has_the_form_of_decoding_already_is_not_copied_for_it():
  params = tiny.tiny_params()
  frozen = tiny.forward(join=("attention",), unroll=2).freeze(params)
  model = loading.Model(tiny.tiny_config(), frozen, None, (), None, Path())
  ours = loading.Model(tiny.tiny_config(), params, None, (), None, Path())
  assert_trees(np.testing.assert_array_equal, model.base_decoding_params, ours.base_decoding_params)
  shared = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), frozen)
  got = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), model.base_decoding_params)
  assert {name: got[name] for name in got if name != "layers"} == {
    name: shared[name] for name in shared if name != "layers"
  }
  for mine, theirs in zip(got["layers"], shared["layers"], strict=True):
    assert mine["attention"] == theirs["attention"]
    assert mine["mlp"]["down"] == theirs["mlp"]["down"]
