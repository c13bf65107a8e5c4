"""What a noise kind is, and what kinds share."""

from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig

# Validation sums up each round in so many parts.
NOISE_BUCKETS = 4


class Noised(NamedTuple):
  """What the rounds see instead of the response, next to the batch that it belongs to: [B, S].

  Attributes:
    ids: int32, what the first round sees.
    is_noise: bool, which of these were replaced by the noise token.
    later: int32, what further rounds see at positions that are not refined.
    later_is_noise: bool, which of these are noise again.
    refined: bool, positions where a further round sees the prediction of the round before it.
    trained: bool, response tokens that the rounds are scored on.
    clean: bool, response tokens that the loss on the clean text is scored on.
    weights: float32, how much the prediction made at each position counts in a round.
    rates: float32, the chance with which the token was noised.
  """

  ids: jax.Array
  is_noise: jax.Array
  later: jax.Array
  later_is_noise: jax.Array
  refined: jax.Array
  trained: jax.Array
  clean: jax.Array
  weights: jax.Array
  rates: jax.Array


class NoiseKind(Protocol):
  """One way to corrupt responses: everything that a run asks of it.

  Kinds are frozen dataclasses, so that the compiled step can depend on them.

  Attributes:
    config: its settings.
    clean_text_inside: whether every round's batch holds the clean text too, with
      `Batch.block_starts` or `block_columns` for attention. The loss on clean text then needs no
      pass of its own.
  """

  clean_text_inside: ClassVar[bool]

  @property
  def config(self) -> NoiseConfig: ...

  def columns(self, length: int) -> int:
    """Counts the columns of a noised batch that was made from one of `length` columns."""
    ...

  def check(self) -> None:
    """Raises UserError where the config's values make no sense for this kind."""
    ...

  def corrupt(self, key: jax.Array, batch: Batch, noise_token: int) -> tuple[Batch, Noised]:
    """Noise for a batch [B, T].

    All draws depend on the key, the example and the position in it, not on the row that the
    example was packed into.

    Returns:
      the batch that the rounds work on, clean, and its noise.
    """
    ...

  def describe(self, token: str) -> str:
    """Says for a model card what the rounds were shown, in a sentence.

    Args:
      token: what to call the noise token.
    """
    ...

  def refinement(self, noise_token: int) -> dict:
    """What a sampler has to know of the training: "refinement" of generation_config.json."""
    ...

  def buckets(self) -> tuple[str, ...]:
    """Names of the NOISE_BUCKETS parts that each round's validation loss is also reported in.

    Empty: in no parts.
    """
    ...

  def bucket(self, noised: Noised) -> jax.Array:
    """Says which of NOISE_BUCKETS parts each token counts in: int32 [B, S]."""
    ...


def random_ids(key: jax.Array, *salts_BN: jax.Array, below: int) -> jax.Array:
  """Draws ids uniformly below a number, each a function of the key and its salts: int32 [B, N]."""

  def one(*values):
    own_key = key
    for value in values:
      own_key = jax.random.fold_in(own_key, value)
    return jax.random.randint(own_key, (), 0, below)

  return jax.vmap(jax.vmap(one))(*salts_BN)


def with_random_ids(key: jax.Array, batch: Batch, noised: Noised, below: int) -> Noised:
  """The same noise with ids drawn uniformly below a number in place of the noise token."""
  ids = random_ids(key, batch.example_ids, batch.positions, below=below)
  return noised._replace(
    ids=jnp.where(noised.is_noise, ids, noised.ids),
    later=jnp.where(noised.later_is_noise, ids, noised.later),
  )


def response_lengths(batch: Batch) -> jax.Array:
  """Counts the response tokens in each token's example: int32 [B, T]."""
  return _count_by_segment(batch, batch.response_mask)


def response_offsets(batch: Batch) -> jax.Array:
  """Counts from the first token of the response, which ends its example; < 0 in prompts.

  Returns:
    int32 [B, T].
  """
  everything = _count_by_segment(batch, jnp.ones_like(batch.response_mask))
  return batch.positions - (everything - response_lengths(batch))


def _count_by_segment(batch, flags_BT):
  def count(segments, flags):
    sums = jnp.zeros(len(segments) + 1, jnp.int32).at[segments].add(flags.astype(jnp.int32))
    return sums[segments]

  return jax.vmap(count)(jnp.asarray(batch.segment_ids), jnp.asarray(flags_BT))
