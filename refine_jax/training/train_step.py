"""The training and evaluation steps: pure functions of (state, batch)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from refine_jax.batch import Array, Batch
from refine_jax.config import OptimConfig
from refine_jax.objective import block_metrics
from refine_jax.objective import noise as noise_lib
from refine_jax.objective import plan as plan_lib
from refine_jax.objective import rounds as objective
from refine_jax.training import gradients, optim
from refine_jax.training.forward import ForwardConfig
from refine_jax.training.step_config import StepConfig


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32, steps taken, skipped ones included.
    skipped: int32, steps whose update was dropped as not finite.
    skipped_in_row: int32, of those the latest ones without a good one between.
    params: float32 masters (model.init_params).
    opt_state: optax's.
  """

  step: jax.Array
  skipped: jax.Array
  skipped_in_row: jax.Array
  params: Any
  opt_state: Any


def init_state(params: dict, optim_config: OptimConfig) -> TrainState:
  """Step 0 with these parameters."""
  # Three arrays, not one three times: the state is donated, and a buffer only once.
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_row=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optim.optimizer(optim_config).init(params),
  )


def train_step(
  state: TrainState,
  batch: Batch,
  frozen: dict | None = None,
  *,
  step_config: StepConfig,
  forward: ForwardConfig,
) -> tuple:
  """One optimizer step.

  Args:
    state: donated by the caller's jit.
    batch: arrays [A, B, T]: A micro-batches of B rows.
    frozen: with an adapter, the base's parameters (forward.freeze).

  Returns:
    the new state; a dict of float32 metrics: scalars loss_total, grad_norm, lr, noise_mean (for a
    gated adapter drafts_per_token: scored drafts for each response token), tokens,
    response_tokens, skipped, skipped_in_row; and "terms", for the name of each term of the plan
    objective.ROUND_SUMS, scalars.
  """
  key = jax.random.fold_in(jax.random.key(step_config.seed), state.step)
  response_tokens = sum_over_batch(lambda b: b.response_mask, batch)
  tokens = sum_over_batch(lambda b: b.segment_ids > 0, batch)
  plan = step_config.plan
  gradients_of = gradients.of_drafts if step_config.gated else gradients.of_rounds
  gradient, sums, noised_tokens = gradients_of(
    state.params, batch, frozen, key, step_config, forward
  )
  loss, count = (jnp.stack([sums[term.name][x] for term in plan]) for x in ("loss", "count"))
  weights = jnp.asarray([term.weight for term in plan])
  loss_total = jnp.sum(loss / jnp.maximum(count, 1) * weights)
  new_state, norm, rate = _update(state, gradient, loss_total, step_config)
  noised = noised_tokens / jnp.maximum(response_tokens, 1)
  metrics = {
    "terms": sums,
    "loss_total": loss_total,
    "grad_norm": norm,
    "lr": rate,
    "drafts_per_token" if step_config.gated else "noise_mean": noised,
    "tokens": tokens,
    "response_tokens": response_tokens,
    "skipped": new_state.skipped.astype(jnp.float32),
    "skipped_in_row": new_state.skipped_in_row.astype(jnp.float32),
  }
  return new_state, metrics


def sum_over_batch(select: Callable, batch: Batch) -> jax.Array:
  """The float32 sum over all micro-batches of what `select` takes from one."""
  return jnp.sum(jax.vmap(select)(batch), dtype=jnp.float32)


def _update(state, gradients, loss, step_config):
  """The new state, the gradient's norm and the learning rate; the old values if not finite."""
  norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(norm) & jnp.isfinite(loss)
  rate = optim.schedule(step_config.optim, step_config.total_steps)(state.step)
  updates, opt_state = optim.optimizer(step_config.optim).update(
    gradients, state.opt_state, state.params
  )
  params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)

  def keep_old_unless_finite(new, old):
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  bad = (~finite).astype(jnp.int32)
  new_state = TrainState(
    step=state.step + 1,
    skipped=state.skipped + bad,
    skipped_in_row=(state.skipped_in_row + 1) * bad,
    params=keep_old_unless_finite(params, state.params),
    opt_state=keep_old_unless_finite(opt_state, state.opt_state),
  )
  return new_state, norm, rate


def eval_step(
  params: dict,
  batch: Batch,
  frozen: dict | None = None,
  *,
  step_config: StepConfig,
  forward: ForwardConfig,
) -> dict:
  """Sums for validation.

  The noise is that of step 0, so that every validation sees the same.

  Args:
    batch: arrays [B, T].
    frozen: as in `train_step`.

  Returns:
    "terms": for the name of each round objective.ROUND_SUMS, float32 [buckets], by the buckets of
    the noise kind, or, for a gated adapter, those of "draft", float32 scalars; for "clean", whether
    or not the plan has it, the same of one pass over the clean text, float32 scalars. "block":
    block_metrics.block_sums, of one pass more than there are rounds.
  """
  key = jax.random.key(step_config.seed)
  working = forward.working(params, frozen)

  def predict(tokens, clean=batch, trained=None):
    targets, scored = objective.next_token_targets(clean, trained)
    return forward.loss(working, tokens, targets, scored.astype(jnp.float32))[1]

  block_size = step_config.noise.block_size
  blocks = noise_lib.block_noise(key, batch, block_size, step_config.noise_token)
  blocks = _as_trained(key, batch, blocks, step_config, forward)
  targets, scored = objective.next_token_targets(batch)
  clean = objective.round_sums(
    batch, batch.ids, targets, scored.astype(jnp.float32), predict(batch)
  )
  if step_config.gated:
    terms = gradients.sums_of_drafts(params, batch, frozen, key, step_config, forward)
  else:
    terms = _round_terms(predict, key, batch, step_config)
  return {
    "terms": terms | {plan_lib.CLEAN: jax.tree.map(jnp.sum, clean)},
    "block": block_metrics.block_sums(
      predict,
      batch,
      blocks,
      block_size=block_size,
      passes=step_config.objective.num_iterations + 1,
      eos=step_config.eos_token,
    ),
  }


def _round_terms(predict, key, batch, step_config) -> dict:
  """For the name of each round objective.ROUND_SUMS, by the buckets of the noise kind."""
  kind = noise_lib.from_config(step_config.noise)
  round_batch, noised = kind.corrupt(key, batch, step_config.noise_token)
  in_bucket = jax.nn.one_hot(kind.bucket(noised), noise_lib.NOISE_BUCKETS)

  def collect(_, output):
    targets, scored = objective.next_token_targets(round_batch, noised.trained)
    weights = scored * noised.weights
    sums = objective.round_sums(round_batch, noised.ids, targets, weights, output)
    return {name: jnp.einsum("bt,btk->k", x, in_bucket) for name, x in sums.items()}

  rounds = plan_lib.rounds(plan_lib.plan(step_config.objective, step_config.noise))
  by_round = objective.refine(
    lambda tokens: predict(tokens, round_batch, noised.trained),
    round_batch,
    noised,
    num_rounds=len(rounds),
    collect=collect,
  )
  return {t.name: {k: x[i] for k, x in by_round.items()} for i, t in enumerate(rounds)}


def _as_trained(key, batch, noised, step_config, forward):
  """Noise with the ids that training draws (config.noise.random)."""
  if not step_config.noise.random:
    return noised
  return noise_lib.with_random_ids(key, batch, noised, forward.model.vocab_size)


def debug_rounds(
  params: dict,
  batch: Batch,
  frozen: dict | None = None,
  *,
  step_config: StepConfig,
  forward: ForwardConfig,
  step: Array,
) -> dict:
  """Follows one row through the rounds, for log/debug.log: batch arrays are [1, T].

  Returns:
    "inputs" int32 [rounds, T]: s0, s1, ..; "predictions" int32 [rounds, T]: what each round
    predicts for the position of each token.
  """
  key = jax.random.fold_in(jax.random.key(step_config.seed), step)
  length = batch.ids.shape[1]
  batch, noised = noise_lib.add_noise(key, batch, step_config.noise, step_config.noise_token)
  noised = _as_trained(key, batch, noised, step_config, forward)
  targets, scored = objective.next_token_targets(batch)
  working = forward.working(params, frozen)

  def predict(tokens):
    return forward.loss(working, tokens, targets, scored.astype(jnp.float32))[1]

  def of_row(ids):
    if batch.block_columns is None:
      return ids[0, -length:]  # where a copy stands next to the clean text, the copy
    columns = jnp.where(batch.response_mask[0, length:], batch.block_columns.reshape(-1), length)
    return batch.ids[0, :length].at[columns].set(ids[0, length:], mode="drop")

  def collect(ids, output):
    # A prediction for the position of each next token, refined or not.
    everywhere = noised._replace(refined=batch.response_mask)
    after = objective.next_round_ids(batch, output.predictions, everywhere)
    return {"inputs": of_row(ids), "predictions": of_row(after)}

  rounds = step_config.objective.num_iterations
  return objective.refine(predict, batch, noised, num_rounds=rounds, collect=collect)


def jit_train_step(
  step_config: StepConfig, forward: ForwardConfig, state_shardings: Any = None
) -> Callable:
  """The one place where the step is compiled: state donated, its shardings kept."""
  step = functools.partial(train_step, step_config=step_config, forward=forward)
  out = None if state_shardings is None else (state_shardings, None)
  return jax.jit(step, donate_argnums=0, out_shardings=out)
