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

from refine_jax.objective.noise import Noised


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
  # Not the first token of a copy beside the clean text, which starts at 0 again.
  same_example &= after(batch["positions"]) == batch["positions"] + 1
  return after(batch["ids"]), after(trained_BT) & same_example


def next_round_ids(batch: dict, predictions_BT, noised: Noised):
  """What the next round sees: the predictions for places that are refined, else noised.later."""
  predicted_BT = jnp.pad(predictions_BT[:, :-1], ((0, 0), (1, 0)))
  starts = batch["positions"] == 0  # nothing of its own example predicts it
  return jnp.where(noised.refined & ~starts, predicted_BT, noised.later)


# The sums that a round's metrics are made of, over scored tokens; "corrupted" and "clean" say
# what the noise did to the token that is predicted.
ROUND_SUMS = ("loss", "count", "corrupted", "corrupted_right", "clean", "clean_right")


def round_sums(batch: dict, noised_BT, targets_BT, weights_BT, output) -> dict:
  """Per token float32 [B, T] terms of ROUND_SUMS for one round's head output.

  Args:
    weights_BT: of each prediction; 0 where none is scored.
  """
  changed = jnp.pad((noised_BT != batch["ids"])[:, 1:], ((0, 0), (0, 1)))
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


def refine(predict: Callable, batch: dict, noised: Noised, *, num_rounds: int, collect: Callable):
  """Runs the rounds without gradients.

  Args:
    predict: ids_BT -> HeadOutput against the clean targets.
    collect: (round ids_BT, HeadOutput) -> what to keep of a round.

  Returns:
    What `collect` gave, stacked over rounds.
  """

  def body(ids_BT, _):
    output = predict(ids_BT)
    return next_round_ids(batch, output.predictions, noised), collect(ids_BT, output)

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
    round_loss: (params, ids_BS, micro-batch, targets_BS, weights_BS, scored_BS) -> (sum of weight
      * cross-entropy, HeadOutput of what is scored).
    batch, noised: arrays [A, B, S], of noise.add_noise. Each loss is a mean over its scored tokens
      of all A.
    loss_weights: one a round.
    clean_weight: of the next-token loss on the clean text; 0: none. It has a pass of its own before
      the rounds, or, where blocks stand beside the clean text, a part in the first round.

  Returns:
    the gradient, float32, like params; dict of ROUND_SUMS, float32 [losses]: the clean one, if
    there is one, and the rounds.
  """
  beside = "block_starts" in batch
  own_pass = int(clean_weight > 0 and not beside)
  passes, micro_batches = own_pass + len(loss_weights), noised.ids.shape[0]
  round_weights = jnp.asarray((0.0,) * own_pass + tuple(loss_weights), jnp.float32)
  clean_weights = jnp.zeros(passes).at[0].set(clean_weight)

  def weights_of(micro, noise):
    """Of the clean text's predictions, and of the round's."""
    clean = next_token_targets(micro, micro["response_mask"] & ~beside_copy(micro))[1]
    return clean.astype(jnp.float32), next_token_targets(micro, noise.trained)[1] * noise.weights

  totals = jax.tree.map(
    lambda w: jnp.maximum(jnp.sum(w), 1e-6), jax.vmap(weights_of)(batch, noised)
  )

  def body(carry, turn):
    ids_BS, gradients = carry
    micro, noise = jax.tree.map(lambda x: jnp.asarray(x)[turn // passes], (batch, noised))
    index = turn % passes
    is_clean = index < own_pass
    ids_BS = jnp.where(index == own_pass, noise.ids, jnp.where(is_clean, micro["ids"], ids_BS))
    targets_BS = next_token_targets(micro)[0]
    clean_BS, round_BS = weights_of(micro, noise)
    weights_BS = clean_weights[index] / totals[0] * clean_BS
    weights_BS += round_weights[index] / totals[1] * round_BS
    # A round of weight 0 is predicted all the same, for the one after it.
    scored_BS = (weights_BS > 0) | (~is_clean & (round_BS > 0))

    def loss(params):
      return round_loss(params, ids_BS, micro, targets_BS, weights_BS, scored_BS)

    turn_gradients, output = jax.grad(loss, has_aux=True)(params)
    gradients = jax.tree.map(lambda a, g: a + g.astype(a.dtype), gradients, turn_gradients)
    sums = {
      "clean": round_sums(micro, micro["ids"], targets_BS, clean_BS, output),
      "round": round_sums(micro, noise.ids, targets_BS, round_BS, output),
    }
    ids_BS = next_round_ids(micro, output.predictions, noise)
    return (ids_BS, gradients), jax.tree.map(jnp.sum, sums)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  (_, gradients), sums = jax.lax.scan(
    body, (noised.ids[0], zeros), jnp.arange(micro_batches * passes)
  )
  sums = jax.tree.map(lambda x: x.reshape(-1, passes).sum(axis=0), sums)
  clean, rounds = sums["clean"], jax.tree.map(lambda x: x[own_pass:], sums["round"])
  if clean_weight > 0:
    rounds = jax.tree.map(lambda c, r: jnp.concatenate([c[:1], r]), clean, rounds)
  return gradients, rounds


def beside_copy(batch: dict):
  """Whether a token is of the copy that stands beside the clean text: bool [B, S]."""
  columns = jnp.arange(batch["ids"].shape[-1])
  copy = columns >= (batch["block_starts"].shape[-1] if "block_starts" in batch else len(columns))
  return jnp.broadcast_to(copy, batch["ids"].shape)
