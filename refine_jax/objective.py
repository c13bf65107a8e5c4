"""The refinement objective: noise, the next-token shift, rounds, and their gradients.

Round 0 predicts the clean response from a noised one, each further round from the model's own
greedy prediction of the round before. Pure jnp on arrays; knows no model. A batch is a dict of

  ids [B, T] int32              the clean tokens t0; 0 where there is padding
  segment_ids [B, T] int32      1, 2, .. for the examples of a packed row, 0 for padding
  positions [B, T] int32        in its own example
  response_mask [B, T] bool     tokens of a response, its EOS included
  example_ids [B, T] int32      which example of the data set, -1 for padding
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from refine_jax.config import NoiseConfig


def next_token_targets(batch: dict) -> tuple:
  """The only place where inputs and targets are shifted against each other.

  Returns:
    targets_BT: int32, the clean token after each one.
    scored_BT: bool, where that token is of the same example's response.
  """
  def after(x):
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

  same_example = after(batch["segment_ids"]) == batch["segment_ids"]
  return after(batch["ids"]), after(batch["response_mask"]) & same_example


def next_round_ids(batch: dict, predictions_BT, scored_BT):
  """Clean prompts with each response token replaced by what was predicted for its place."""
  def before(x):
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))

  return jnp.where(before(scored_BT), before(predictions_BT), batch["ids"])


def noise_rates(key, batch: dict, noise: NoiseConfig):
  """Each token's rate t: float32 [B, T], one draw an example, uniform in [min, max]."""
  return _uniforms(key, batch, noise)[0]


def noise_ids(key, batch: dict, noise: NoiseConfig, noise_token: int) -> tuple:
  """Replaces each response token by the noise token with its example's probability t.

  The draws depend on the key, the example and the position in it, not on the row that the
  example was packed into.

  Returns:
    noised ids int32 [B, T]; rates float32 [B, T].
  """
  rates_BT, draws_BT = _uniforms(key, batch, noise)
  noised = batch["response_mask"] & (draws_BT < rates_BT)
  return jnp.where(noised, noise_token, batch["ids"]), rates_BT


def _uniforms(key, batch, noise):
  def draw(example, position):
    example_key = jax.random.fold_in(key, example)
    rate = jax.random.uniform(example_key)
    return rate, jax.random.uniform(jax.random.fold_in(example_key, position + 1))

  rate, draw_BT = jax.vmap(jax.vmap(draw))(batch["example_ids"], batch["positions"])
  return noise.noise_min + (noise.noise_max - noise.noise_min) * rate, draw_BT


# The sums that a round's metrics are made of, over scored tokens; "corrupted" and "clean" say
# what the noise did to the token that is predicted.
ROUND_SUMS = ("loss", "count", "corrupted", "corrupted_right", "clean", "clean_right")


def round_sums(batch: dict, noised_BT, targets_BT, scored_BT, output) -> dict:
  """Per token float32 [B, T] terms of ROUND_SUMS for one round's head output."""
  changed = jnp.pad((noised_BT != batch["ids"])[:, 1:], ((0, 0), (0, 1)))
  right = output.predictions == targets_BT
  terms = {
    "loss": output.losses,
    "count": scored_BT,
    "corrupted": scored_BT & changed,
    "corrupted_right": scored_BT & changed & right,
    "clean": scored_BT & ~changed,
    "clean_right": scored_BT & ~changed & right,
  }
  return {name: x.astype(jnp.float32) for name, x in terms.items()}


def refine(
  predict: Callable, batch: dict, noised_BT, *, num_rounds: int, collect: Callable
):
  """Runs the rounds without gradients.

  Args:
    predict: ids_BT -> HeadOutput against the clean targets.
    collect: (round ids_BT, HeadOutput) -> what to keep of a round.

  Returns:
    What `collect` gave, stacked over rounds.
  """
  _, scored_BT = next_token_targets(batch)

  def body(ids_BT, _):
    output = predict(ids_BT)
    return next_round_ids(batch, output.predictions, scored_BT), collect(ids_BT, output)

  return jax.lax.scan(body, noised_BT, None, length=num_rounds)[1]


def refinement_gradients(
  round_loss: Callable, params, batch: dict, noised_ABT, *, loss_weights, total_count
):
  """The gradient of sum_i loss_weights[i] * loss_si over all micro-batches.

  No gradient passes through the greedy decode between rounds, so the gradient of the sum is the
  sum of the rounds' gradients: each round runs forward and backward before the next one starts,
  and memory does not grow with their number. Rounds and micro-batches are turns of one scan,
  because the carry of a nested one, a whole gradient, would be copied at each entry.

  Args:
    round_loss: (params, ids_BT, micro-batch, targets_BT, weights_BT) -> (sum of weight *
      cross-entropy, HeadOutput).
    batch: arrays [A, B, T].
    loss_weights: one a round.
    total_count: scored tokens in the whole global batch; each loss is a mean over them.

  Returns:
    the gradient, float32, like params; dict of ROUND_SUMS, float32 [rounds].
  """
  rounds, micro_batches = len(loss_weights), noised_ABT.shape[0]
  weights = jnp.asarray(loss_weights, jnp.float32)

  def body(carry, turn):
    ids_BT, gradients = carry
    micro, noised_BT = jax.tree.map(lambda x: jnp.asarray(x)[turn // rounds], (batch, noised_ABT))
    ids_BT = jnp.where(turn % rounds == 0, noised_BT, ids_BT)
    targets_BT, scored_BT = next_token_targets(micro)
    weights_BT = scored_BT.astype(jnp.float32) / jnp.maximum(total_count, 1)

    def loss(params):
      total, output = round_loss(params, ids_BT, micro, targets_BT, weights_BT)
      return weights[turn % rounds] * total, output

    round_gradients, output = jax.grad(loss, has_aux=True)(params)
    gradients = jax.tree.map(lambda a, g: a + g.astype(a.dtype), gradients, round_gradients)
    sums = round_sums(micro, noised_BT, targets_BT, scored_BT, output)
    ids_BT = next_round_ids(micro, output.predictions, scored_BT)
    return (ids_BT, gradients), jax.tree.map(jnp.sum, sums)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  (_, gradients), sums = jax.lax.scan(
    body, (noised_ABT[0], zeros), jnp.arange(micro_batches * rounds)
  )
  return gradients, jax.tree.map(lambda x: x.reshape(-1, rounds).sum(axis=0), sums)
