"""The refinement objective: the next-token shift, rounds, and their gradients.

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

from refine_jax.noise import Noised


def next_token_targets(batch: dict, trained_BT=None) -> tuple:
  """The only place, with next_round_ids, where inputs and targets are shifted.

  Args:
    trained_BT: bool, tokens to predict; default: all responses.

  Returns:
    targets_BT: int32, the clean token after each one.
    scored_BT: bool, where that token is one to predict, of the same example.
  """
  trained_BT = batch["response_mask"] if trained_BT is None else trained_BT

  def after(x):
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

  same_example = after(batch["segment_ids"]) == batch["segment_ids"]
  return after(batch["ids"]), after(trained_BT) & same_example


def next_round_ids(batch: dict, predictions_BT, refined_BT):
  """The clean tokens, those of refined_BT replaced by what was predicted for their places."""
  predicted_BT = jnp.pad(predictions_BT[:, :-1], ((0, 0), (1, 0)))
  starts = batch["positions"] == 0  # nothing of its own example predicts it
  return jnp.where(refined_BT & ~starts, predicted_BT, batch["ids"])


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
  predict: Callable, batch: dict, noised: Noised, *, num_rounds: int, collect: Callable
):
  """Runs the rounds without gradients.

  Args:
    predict: ids_BT -> HeadOutput against the clean targets.
    collect: (round ids_BT, HeadOutput) -> what to keep of a round.

  Returns:
    What `collect` gave, stacked over rounds.
  """

  def body(ids_BT, _):
    output = predict(ids_BT)
    return next_round_ids(batch, output.predictions, noised.refined), collect(ids_BT, output)

  return jax.lax.scan(body, noised.ids, None, length=num_rounds)[1]


def refinement_gradients(
  round_loss: Callable, params, batch: dict, noised: Noised, *, loss_weights, clean_weight=0.0
):
  """The gradient of clean_weight * loss_clean + sum_i loss_weights[i] * loss_si.

  No gradient passes through the greedy decode between rounds, so the gradient of the sum is the
  sum of the rounds' gradients: each round runs forward and backward before the next one starts,
  and memory does not grow with their number. Passes and micro-batches are turns of one scan,
  because the carry of a nested one, a whole gradient, would be copied at each entry.

  Args:
    round_loss: (params, ids_BT, micro-batch, targets_BT, weights_BT) -> (sum of weight *
      cross-entropy, HeadOutput).
    batch, noised: arrays [A, B, T]. Each loss is a mean over its scored tokens of all A.
    loss_weights: one a round.
    clean_weight: of the next-token loss on the clean text, in a pass of its own before the rounds;
      0: no such pass.

  Returns:
    the gradient, float32, like params; dict of ROUND_SUMS, float32 [passes]: the clean pass, if
    there is one, and the rounds.
  """
  clean = int(clean_weight > 0)
  passes, micro_batches = clean + len(loss_weights), noised.ids.shape[0]
  weights = jnp.asarray((clean_weight,) * clean + tuple(loss_weights), jnp.float32)

  def count(trained):
    return jnp.sum(jax.vmap(lambda b, t: next_token_targets(b, t)[1])(batch, trained))

  counts = jnp.stack([count(batch["response_mask"]), count(noised.trained)])

  def body(carry, turn):
    ids_BT, gradients = carry
    micro, noise = jax.tree.map(lambda x: jnp.asarray(x)[turn // passes], (batch, noised))
    index = turn % passes
    is_clean = index < clean
    ids_BT = jnp.where(index == clean, noise.ids, jnp.where(is_clean, micro["ids"], ids_BT))
    trained_BT = jnp.where(is_clean, micro["response_mask"], noise.trained)
    targets_BT, scored_BT = next_token_targets(micro, trained_BT)
    total = jnp.where(is_clean, counts[0], counts[1])
    weights_BT = scored_BT.astype(jnp.float32) / jnp.maximum(total, 1)

    def loss(params):
      value, output = round_loss(params, ids_BT, micro, targets_BT, weights_BT)
      return weights[index] * value, output

    round_gradients, output = jax.grad(loss, has_aux=True)(params)
    gradients = jax.tree.map(lambda a, g: a + g.astype(a.dtype), gradients, round_gradients)
    noised_BT = jnp.where(is_clean, micro["ids"], noise.ids)
    sums = round_sums(micro, noised_BT, targets_BT, scored_BT, output)
    ids_BT = next_round_ids(micro, output.predictions, noise.refined)
    return (ids_BT, gradients), jax.tree.map(jnp.sum, sums)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  (_, gradients), sums = jax.lax.scan(
    body, (noised.ids[0], zeros), jnp.arange(micro_batches * passes)
  )
  return gradients, jax.tree.map(lambda x: x.reshape(-1, passes).sum(axis=0), sums)
