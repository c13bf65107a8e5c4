"""Log-probabilities of a text's tokens in the model's own distribution, by one pass over them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.decoding import loading
from refine_jax.decoding.loading import Model
from refine_jax.decoding.programs import bucket
from refine_jax.model import transformer

_LEAST, _CHUNK = 128, 64  # tokens: of the shortest program, and whose logits are there at a time


class Scores(NamedTuple):
  """Log-probabilities (nats, temperature 1) of every token after the first.

  Attributes:
    tokens: float32 [T - 1], of the text's own tokens.
    top_ids: int32 [T - 1, K], the likeliest tokens in each place, the best first.
    top: float32 [T - 1, K], theirs.
  """

  tokens: np.ndarray
  top_ids: np.ndarray
  top: np.ndarray


def score(model: Model, ids: list[int], top: int) -> Scores:
  """Scores a text; a gated adapter has no part in it.

  Args:
    ids: at least two; all but the last are read.
    top: how many of the likeliest tokens, K.
  """
  count = len(ids) - 1
  size = bucket(count, _LEAST)  # a multiple of _CHUNK
  padded = np.zeros(size + 1, np.int32)
  padded[: len(ids)] = ids
  most = min(max(top, 1), model.config.vocab_size)
  found = jax.device_get(_scores(model.params, padded, config=model.config, top=most))
  tokens, top_ids, values = (x[:count] for x in found)
  return Scores(tokens, top_ids[:, :top], values[:, :top])


@functools.partial(jax.jit, static_argnames=("config", "top"))
def _scores(params, ids, *, config, top):
  """Of ids [T + 1]: float32 [T], int32 [T, K], float32 [T, K]."""
  read = ids[None, :-1]
  x_TD = loading.hidden_states(params, config, read, jnp.ones_like(read))[0]

  def chunk(arguments):
    x, targets = arguments
    logits = transformer.logits(params, x)
    logits -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, best = jax.lax.top_k(logits, top)
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], best, values

  chunks = x_TD.reshape(-1, _CHUNK, x_TD.shape[-1]), ids[1:].reshape(-1, _CHUNK)
  return [x.reshape(-1, *x.shape[2:]) for x in jax.lax.map(chunk, chunks)]
