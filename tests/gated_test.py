"""A gated adapter: two streams against one dense pass, and a base that stays as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny

from refine_jax.model import adapters, layout, transformer
from refine_jax.objective import draft_blocks
from refine_jax.objective.draft_gradients import DRAFT, draft_gradients
from refine_jax.training import gradients, metrics, train_step

DRAFTS = 4
ADAPTER = adapters.Adapter(kind="gated", rank=3, alpha=6.0)


def random_factors(config, adapter=ADAPTER, seed=1):
  factors = adapters.init_params(config, adapter, jax.random.key(seed))
  leaves, structure = jax.tree.flatten(factors)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(
    structure,
    [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)],
  )


def problem(config, anchors=0):
  batch = tiny.packed_batch()
  blocks = draft_blocks.draw(
    jax.random.key(5), batch, anchors=anchors, drafts=DRAFTS, noise_token=tiny.NOISE_TOKEN
  )
  return tiny.params_with_biases(config), random_factors(config), batch, blocks


def dense_attention(batch, blocks, window):
  """One mask over clean tokens and drafts side by side."""
  segments, length = batch.segment_ids, batch.ids.shape[1]
  column = np.arange(length)
  near = (lambda distance: distance < window) if window else (lambda distance: True)
  distance = column[:, None] - column[None, :]
  clean = (segments[:, :, None] == segments[:, None, :]) & (distance >= 0) & near(distance)
  first, end, at = (np.asarray(x)[..., None] for x in (blocks.first, blocks.end, blocks.columns))
  before = (column >= first) & (column < end) & near(at - column)
  order = np.arange(at.shape[1])
  distance = order[:, None] - order[None, :]
  own = (order[:, None] // DRAFTS == order[None, :] // DRAFTS) & (distance >= 0) & near(distance)
  own = np.broadcast_to(own, (len(segments), *own.shape))
  nothing = np.zeros((*clean.shape[:2], len(order)), bool)
  mask = np.concatenate([np.concatenate([clean, nothing], 2), np.concatenate([before, own], 2)], 1)

  def attend(q, k, v, cache, scale=None):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale), cache

  return attend


def dense_loss(factors, params, config, batch, blocks, target):
  attached = adapters.attach(params, adapters.working_copy(factors, ADAPTER, "float32"), config)
  clean_noise = np.zeros(batch.ids.shape, bool)
  tokens = batch._replace(
    **{
      name: jnp.concatenate([x, y], axis=1)
      for name, x, y in (
        ("ids", batch.ids, blocks.tokens.ids),
        ("positions", batch.positions, blocks.tokens.positions),
        ("is_noise", clean_noise, blocks.tokens.is_noise),
      )
    }
  )
  x = transformer.hidden_states(
    attached, config, tokens, lambda window: dense_attention(batch, blocks, window)
  )
  log_probs = jax.nn.log_softmax(transformer.logits(params, x))
  length = batch.ids.shape[1]
  log_q = log_probs[:, length:]
  log_p = jnp.take_along_axis(log_probs[:, :length], blocks.columns[..., None], axis=1)
  log_p = jax.lax.stop_gradient(log_p)
  references = blocks.targets if target == "data" else jnp.argmax(log_p, axis=-1)
  losses = {
    "data": lambda: -jnp.take_along_axis(log_q, references[..., None], axis=-1)[..., 0],
    "kl": lambda: jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1),
    "tv": lambda: jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1) / 2,
  }[target]()
  right = jnp.sum((jnp.argmax(log_q, axis=-1) == references) & (blocks.weights > 0))
  return jnp.sum(losses * blocks.weights) / jnp.sum(blocks.weights), right


@pytest.mark.parametrize(
  ("target", "anchors", "unroll", "remat", "changes"),
  [
    ("kl", 0, 1, "none", {}),
    ("tv", 3, 2, "save_attention", {}),
    pytest.param("data", 0, 1, "full", {"windows": (5, None)}, marks=pytest.mark.slow),
    pytest.param("kl", 3, 1, "none", tiny.GEMMA3, marks=pytest.mark.slow),
  ],
)
def test_two_streams_give_the_gradient_of_one_dense_pass(target, anchors, unroll, remat, changes):
  config = tiny.tiny_config(**{"qk_norm": True} | changes)
  params, factors, batch, blocks = problem(config, anchors)
  forward = tiny.forward(
    config, adapter=ADAPTER, unroll=unroll, remat=remat, join=("attention",) * (unroll > 1)
  )
  frozen = forward.freeze(params)

  def loss(factors, rows, drafts, weights):
    return forward.draft_loss(factors, frozen, rows, drafts, weights, drafts=DRAFTS, target=target)

  halves = jax.tree.map(lambda x: jnp.reshape(x, (2, -1, *x.shape[1:])), (batch, blocks))
  gradients, sums = jax.jit(lambda f: draft_gradients(loss, f, *halves))(factors)
  (want_loss, right), want = jax.value_and_grad(dense_loss, has_aux=True)(
    factors, params, config, batch, blocks, target
  )
  np.testing.assert_allclose(sums[DRAFT]["loss"] / sums[DRAFT]["count"], want_loss, rtol=1e-5)
  assert sums[DRAFT]["corrupted_right"] == right
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6, rtol=2e-4), gradients, want)


def test_a_new_adapter_and_one_without_noise_tokens_change_nothing():
  config = tiny.tiny_config()
  params, factors, batch, _ = problem(config)

  def states(params, batch):
    return transformer.hidden_states(
      params, config, batch, lambda w: lambda q, k, v, c, scale=None: (q, c)
    )

  attached = adapters.attach(params, factors, config)
  np.testing.assert_array_equal(states(params, batch), states(attached, batch))
  noise = batch._replace(is_noise=np.ones(batch.ids.shape, bool))
  new = adapters.init_params(config, ADAPTER, jax.random.key(0))
  np.testing.assert_array_equal(
    states(params, batch), states(adapters.attach(params, new, config), noise)
  )
  assert np.any(states(params, batch) != states(attached, noise))


@pytest.mark.parametrize("projections", [tuple(adapters.PROJECTIONS), ("key", "up", "output")])
def test_joined_projections_and_layers_in_a_list_compute_the_same(projections):
  config = tiny.tiny_config()
  adapter = dataclasses.replace(ADAPTER, projections=projections)
  params, factors = tiny.params_with_biases(config), random_factors(config, adapter)
  batch = tiny.packed_batch()
  batch = batch._replace(is_noise=np.asarray(batch.response_mask))

  def states(params, factors):
    return transformer.hidden_states(
      adapters.attach(params, factors, config),
      config,
      batch,
      lambda w: lambda q, k, v, c, scale=None: (q + jnp.repeat(k + v, 2, axis=2), c),
    )

  joined = layout.join_projections(layout.unstack_layers(params))
  np.testing.assert_allclose(
    states(params, factors), states(joined, layout.unstack_layers(factors)), atol=2e-5
  )


def test_validation_has_the_loss_and_the_noise_of_training():
  config, batch = tiny.tiny_config(), tiny.unpacked_batch(8)
  forward = tiny.forward(config, adapter=ADAPTER)
  base, factors = forward.freeze(tiny.tiny_params(config)), random_factors(config)

  step_config = dataclasses.replace(tiny.step_config(num_iterations=1, kind="block"), gated=True)

  def inputs(random):
    noise = dataclasses.replace(step_config.noise, random=random)
    bound = {"step_config": dataclasses.replace(step_config, noise=noise)}
    bound["forward"] = forward
    sums = jax.jit(functools.partial(train_step.eval_step, **bound))(factors, batch, base)
    one = batch.map(lambda x: x[:1])
    rounds = jax.jit(functools.partial(train_step.debug_rounds, **bound, step=0))
    return sums, rounds(factors, one, base)["inputs"][0][batch.response_mask[0]]

  (plain, noise), (drawn, random_noise) = inputs(False), inputs(True)
  assert set(noise.tolist()) == {tiny.NOISE_TOKEN} and len(set(random_noise.tolist())) > 1
  assert plain["terms"]["draft"]["loss"] != drawn["terms"]["draft"]["loss"]
  assert np.any(plain["block"]["right"] != drawn["block"]["right"])
  values = metrics.eval_metrics(jax.device_get(plain), step_config.objective, step_config.noise)
  assert values["eval/loss_total"] == values["eval/loss_draft"] > 0
  assert 0 <= values["eval/accuracy_draft"] <= 1
  key, one = jax.random.key(step_config.seed), batch.map(lambda x: x[None])
  _, trained, _ = gradients.of_drafts(factors, one, base, key, step_config, forward)
  got = plain["terms"]["draft"]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, trained["draft"])
  jax.tree.map(np.testing.assert_array_equal, plain["terms"]["clean"], drawn["terms"]["clean"])


def test_a_lora_adapter_merged_into_its_base_computes_the_same():
  config = tiny.tiny_config()
  adapter = dataclasses.replace(ADAPTER, kind="lora")
  params, factors, batch, _ = problem(config)
  attached = adapters.attach(params, adapters.working_copy(factors, adapter, "float32"), config)

  def states(params, **options):
    attend = lambda w: lambda q, k, v, c, scale=None: (q, c)  # noqa: E731
    return transformer.hidden_states(params, config, batch, attend, **options)

  merged = adapters.merge(params, factors, adapter)
  np.testing.assert_allclose(states(attached, adapt_all=True), states(merged), atol=2e-5)
  with pytest.raises(ValueError, match="gated"):
    adapters.merge(params, factors, ADAPTER)
