"""What the rounds see instead of the response: a file for each kind of noise."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig
from refine_jax.errors import UserError
from refine_jax.objective.noise.block import BlockNoise, block_noise
from refine_jax.objective.noise.kind import (
  NOISE_BUCKETS,
  Noised,
  NoiseKind,
  response_lengths,
  response_offsets,
  with_random_ids,
)
from refine_jax.objective.noise.uniform import UniformNoise

# config.noise.kind -> what makes the kind of its settings.
KINDS: dict[str, Callable[[NoiseConfig], NoiseKind]] = {
  "uniform": UniformNoise,
  "block": BlockNoise,
}

__all__ = [
  "KINDS",
  "NOISE_BUCKETS",
  "NoiseKind",
  "Noised",
  "add_noise",
  "block_noise",
  "describe",
  "from_config",
  "response_lengths",
  "response_offsets",
  "with_random_ids",
]


def from_config(config: NoiseConfig) -> NoiseKind:
  """Returns the kind that the config names.

  Raises:
    UserError: there is no such kind, or it cannot work with the values.
  """
  if config.kind not in KINDS:
    raise UserError(f"config.noise.kind is {config.kind!r}; it is one of {', '.join(KINDS)}.")
  kind = KINDS[config.kind](config)
  kind.check()
  return kind


def describe(values: Mapping[str, Any], token: str) -> str:
  """Says for a model card what a run's rounds were shown, in a sentence.

  Args:
    values: "noise" of the run's config.json; keys that older runs lack have their defaults.
    token: what to call the noise token.
  """
  values = {"kind": "uniform", "block_size": 8, "offset_decay": 1.0, "token": -1} | dict(values)
  if values["kind"] not in KINDS:
    return f"Noise of kind {values['kind']!r}, with {token}."
  return KINDS[values["kind"]](NoiseConfig(**values)).describe(token)


def add_noise(
  key: jax.Array, batch: Batch, config: NoiseConfig, noise_token: int
) -> tuple[Batch, Noised]:
  """Corrupts a batch [B, T] as the config says: see NoiseKind.corrupt."""
  return from_config(config).corrupt(key, batch, noise_token)
