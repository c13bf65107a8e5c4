"""The programs as the host calls them: what it sends is one array, for each is a transfer.

Beside the state they give what the host can wait for and read while the next program, which takes
the state over, is under way.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.decoding import sampler
from refine_jax.decoding import state as state_lib
from refine_jax.decoding.settings import Settings
from refine_jax.decoding.state import Pieces, State
from refine_jax.model.config import ModelConfig

# tokens [B, S], accepted [B, most], probability [B, S] where Settings.log_probabilities is true.
Rows = tuple[jax.Array, jax.Array, jax.Array | None]


class _Layout(NamedTuple):
  """How Pieces stand in one array: its first content, and of each leaf columns, dtype and axes."""

  empty: np.ndarray
  leaves: list[tuple[slice, np.dtype, int]]
  structure: Any


@functools.lru_cache(64)
def _layout(settings: Settings, rows: int, count: int, width: int) -> _Layout:
  leaves, structure = jax.tree.flatten(state_lib.empty_pieces(settings, rows, count, width))
  found, start = [], 0
  for x in leaves:
    assert x.dtype == bool or x.dtype.itemsize == 4
    stop = start + (x.shape[1] if x.ndim == 2 else 1)
    found.append((slice(start, stop), x.dtype, x.ndim))
    start = stop
  parts = [x.astype(np.int32) if x.dtype == bool else x.view(np.int32) for x in leaves]
  empty = np.concatenate([part.reshape(count, -1) for part in parts], axis=1)
  return _Layout(empty, found, structure)


def sent_pieces(settings: Settings, rows: int, count: int, width: int) -> tuple[np.ndarray, Pieces]:
  """An array [count, ..] for `enter`, and state.empty_pieces as views of it."""
  layout = _layout(settings, rows, count, width)
  sent = layout.empty.copy()  # a program may read it until it has ended
  views = [
    sent[:, part if axes == 2 else part.start].view(np.int32 if dtype.kind == "b" else dtype)
    for part, dtype, axes in layout.leaves
  ]
  return sent, jax.tree.unflatten(layout.structure, views)


def _received(sent: jax.Array, settings: Settings) -> Pieces:
  """The arrays that `sent_pieces` wrote."""
  count, total = sent.shape
  width = total - _layout(settings, 0, count, 0).empty.shape[1]
  layout = _layout(settings, 0, count, width)
  found = []
  for part, dtype, axes in layout.leaves:
    x = sent[:, part if axes == 2 else part.start]
    found.append(x != 0 if dtype.kind == "b" else jax.lax.bitcast_convert_type(x, dtype))
  return jax.tree.unflatten(layout.structure, found)


def sent_rows(ended: np.ndarray, passes: int, least_active: int) -> np.ndarray:
  """An array for `decode`."""
  return np.array([*ended.tolist(), passes, least_active], np.int32)


def enter(
  params: dict, state: State, sent: jax.Array, *, config: ModelConfig, settings: Settings
) -> tuple[State, jax.Array]:
  """state.enter; and a number to wait for."""
  pieces = _received(sent, settings)
  state = state_lib.enter(params, state, pieces, config=config, settings=settings)
  return state, jnp.sum(state.length)


def decode(
  params: dict, state: State, sent: jax.Array, *, config: ModelConfig, settings: Settings
) -> tuple[State, jax.Array, Rows]:
  """sampler.decode; and the rows as they then are."""
  state, report = sampler.decode(
    params, state, sent[:-2] != 0, sent[-2], sent[-1], config=config, settings=settings
  )
  sure = state.probability if settings.log_probabilities else None
  return state, report, (state.tokens, state.accepted, sure)
