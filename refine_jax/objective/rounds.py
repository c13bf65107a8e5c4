"""The refinement objective: the next-token shift, rounds, and their gradients.

Round 0 predicts the clean response from a noised one, each further round from the model's own
greedy prediction of the round before. Pure jnp on arrays; knows no model.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from refine_jax.batch import Array, Batch
from refine_jax.objective import plan as plan_lib
from refine_jax.objective.noise import Noised


class Scored(Protocol):
  """What a head says of each token, as model.head.HeadOutput has it."""

  @property
  def predictions(self) -> jax.Array: ...

  @property
  def losses(self) -> jax.Array: ...


def next_token_targets(batch: Batch, trained_BT: Array | None = None) -> tuple:
  """The only place, with next_round_ids, where inputs and targets are shifted.

  Args:
    trained_BT: bool, tokens to predict; default: all responses.

  Returns:
    targets_BT: int32, the clean token after each one.
    scored_BT: bool, where that token is one to predict, of the same example.
  """
  trained_BT = batch.response_mask if trained_BT is None else trained_BT

  def after(x):
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

  same_example = after(batch.segment_ids) == batch.segment_ids
  # Not the first token of a copy next to the clean text, which starts at 0 again.
  same_example &= after(batch.positions) == batch.positions + 1
  return after(batch.ids), after(trained_BT) & same_example


def next_round_ids(batch: Batch, predictions_BT: jax.Array, noised: Noised) -> jax.Array:
  """What the next round sees: the predictions for places that are refined, else noised.later."""
  predicted_BT = jnp.pad(predictions_BT[:, :-1], ((0, 0), (1, 0)))
  starts = batch.positions == 0  # nothing of its own example predicts it
  return jnp.where(noised.refined & ~starts, predicted_BT, noised.later)


# The sums that a round's metrics are made of, over scored tokens; "corrupted" and "clean" say
# what the noise did to the token that is predicted.
ROUND_SUMS = ("loss", "count", "corrupted", "corrupted_right", "clean", "clean_right")


def round_sums(
  batch: Batch, noised_BT: Array, targets_BT: jax.Array, weights_BT: jax.Array, output: Scored
) -> dict:
  """Per token float32 [B, T] terms of ROUND_SUMS for one round's head output.

  Args:
    weights_BT: of each prediction; 0 where none is scored.
  """
  changed = jnp.pad((noised_BT != batch.ids)[:, 1:], ((0, 0), (0, 1)))
  right = output.predictions == targets_BT
  scored = weights_BT > 0
  terms = {
    "loss": jnp.where(scored, output.losses * weights_BT, 0),
    "count": weights_BT,
    "corrupted": scored & changed,
    "corrupted_right": scored & changed & right,
    "clean": scored & ~changed,
    "clean_right": scored & ~changed & right,
  }
  return {name: x.astype(jnp.float32) for name, x in terms.items()}


def first_round(batch: Batch, noised: Noised) -> Batch:
  """The input of the first round."""
  return batch._replace(ids=noised.ids, is_noise=noised.is_noise)


def next_round(batch: Batch, predictions_BT: jax.Array, noised: Noised) -> Batch:
  """The input of a further round: see next_round_ids."""
  ids_BT = next_round_ids(batch, predictions_BT, noised)
  return batch._replace(ids=ids_BT, is_noise=noised.later_is_noise)


def refine(
  predict: Callable, batch: Batch, noised: Noised, *, num_rounds: int, collect: Callable
) -> Any:
  """Runs the rounds without gradients.

  Args:
    predict: the round's Batch -> HeadOutput against the clean targets.
    collect: (the round's ids_BT, HeadOutput) -> what to keep of a round.

  Returns:
    What `collect` gave, stacked over rounds.
  """

  def body(tokens, _):
    output = predict(batch._replace(ids=tokens[0], is_noise=tokens[1]))
    after = next_round(batch, output.predictions, noised)
    return (after.ids, after.is_noise), collect(tokens[0], output)

  first = first_round(batch, noised)
  return jax.lax.scan(body, (first.ids, first.is_noise), None, length=num_rounds)[1]


def refinement_gradients(
  round_loss: Callable,
  params: dict,
  batch: Batch,
  noised: Noised,
  plan: plan_lib.Plan,
  sum_over_devices: Callable = lambda turns: turns,
) -> tuple:
  """The gradient of the sum of weight * loss over the plan's terms.

  No gradient passes through the greedy decode between rounds, so the gradient of the sum is the
  sum of the rounds' gradients: each round runs forward and backward before the next one starts,
  and memory does not grow with their number. Passes and micro-batches are steps of one scan,
  because the carry of a nested one, a whole gradient, would be copied at each entry.

  Args:
    round_loss: (params, the pass's Batch [B, S], targets_BS, weights_BS, scored_BS) -> (sum of
      weight * cross-entropy, HeadOutput of what is scored).
    batch, noised: arrays [A, B, S], as NoiseKind.corrupt makes them. Each loss is a mean over its
      scored tokens of all A.
    sum_over_devices: makes of the loop, a function of (params, trees of arrays [A, B, ..], a tree
      of others) that gives sums over rows, one that has the rows split over devices.

  Returns:
    the gradient, float32, like params; for each term's name a dict of ROUND_SUMS, float32 scalars.
  """
  rounds = plan_lib.rounds(plan)
  passes, micro_batches = plan_lib.passes(plan), noised.ids.shape[0]
  own_pass = passes - len(rounds)  # 1 where the clean text has one, before the rounds
  clean_weight = sum(term.weight for term in plan_lib.others(plan))
  round_weights = jnp.asarray((0.0,) * own_pass + tuple(t.weight for t in rounds), jnp.float32)
  clean_weights = jnp.zeros(passes).at[0].set(clean_weight)

  def weights_of(micro, noise):
    """Weights of the clean text's predictions, and of the round's."""
    clean = next_token_targets(micro, noise.clean)[1]
    return clean.astype(jnp.float32), next_token_targets(micro, noise.trained)[1] * noise.weights

  totals = jax.tree.map(
    lambda w: jnp.maximum(jnp.sum(w), 1e-6), jax.vmap(weights_of)(batch, noised)
  )

  def body(params, rows, totals, carry, step):
    ids_BS, gradients = carry
    micro, noise = jax.tree.map(lambda x: jnp.asarray(x)[step // passes], rows)
    index = step % passes
    is_first, is_clean = index == own_pass, index < own_pass
    ids_BS = jnp.where(is_first, noise.ids, jnp.where(is_clean, micro.ids, ids_BS))
    is_noise = jnp.where(is_first, noise.is_noise, noise.later_is_noise & ~is_clean)
    targets_BS = next_token_targets(micro)[0]
    clean_BS, round_BS = weights_of(micro, noise)
    weights_BS = clean_weights[index] / totals[0] * clean_BS
    weights_BS += round_weights[index] / totals[1] * round_BS
    # A round of weight 0 is predicted all the same, for the one after it.
    scored_BS = (weights_BS > 0) | (~is_clean & (round_BS > 0))

    def loss(params):
      shown = micro._replace(ids=ids_BS, is_noise=is_noise)
      return round_loss(params, shown, targets_BS, weights_BS, scored_BS)

    step_gradients, output = jax.grad(loss, has_aux=True)(params)
    gradients = jax.tree.map(lambda a, g: a + g.astype(a.dtype), gradients, step_gradients)
    sums = {
      "clean": round_sums(micro, micro.ids, targets_BS, clean_BS, output),
      "round": round_sums(micro, noise.ids, targets_BS, round_BS, output),
    }
    ids_BS = next_round_ids(micro, output.predictions, noise)
    return (ids_BS, gradients), jax.tree.map(jnp.sum, sums)

  def turns(params, rows, totals):
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    (_, gradients), sums = jax.lax.scan(
      functools.partial(body, params, rows, totals),
      (rows[1].ids[0], zeros),
      jnp.arange(micro_batches * passes),
    )
    return gradients, sums

  gradients, sums = sum_over_devices(turns)(params, (batch, noised), totals)
  sums = jax.tree.map(lambda x: x.reshape(-1, passes).sum(axis=0), sums)
  by_name = {term.name: _entry(sums["round"], own_pass + i) for i, term in enumerate(rounds)}
  if clean_weight > 0:
    by_name[plan_lib.CLEAN] = _entry(sums["clean"], 0)
  return gradients, by_name


def _entry(stacked: dict, index: int) -> dict:
  return {name: x[index] for name, x in stacked.items()}
