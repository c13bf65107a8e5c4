"""Engines that a model keeps between calls, and how many slots a call gets."""

from collections.abc import Sequence

import jax

from refine_jax.decoding.engine import Engine
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import Request
from refine_jax.decoding.settings import settings_for
from refine_jax.errors import UserError

_MOST_ENGINES = 4
# Few numbers of slots serve all calls: these where a pass is short (in tokens of all rows), so that
# rows at rest cost little, and powers of two where it is long.
_SLOTS, _MOST_SLOTS = (1, 8, 64), 64
_SHORT_PASS = {"cpu": 64}
_SHORT_PASS_ELSEWHERE = 512


def take(model: Model, requests: Sequence[Request], slots: int = 0) -> Engine:
  """An engine with these requests submitted, of those that the model keeps where one fits.

  Args:
    requests: at least one.
    slots: 0: as many as suit the requests, fewer where memory is short.

  Raises:
    UserError: there is no memory for it.
  """
  options = requests[0].options
  eos_ids = max(len(request.eos_ids) for request in requests)
  wanted = slots or _slots_for(model, options, len(requests))
  while True:
    settings = settings_for(model, options, wanted, eos_ids)
    for i, engine in enumerate(model.idle_engines):
      if (engine.slots, engine.settings) == (wanted, settings):
        del model.idle_engines[i]
        break
    else:
      engine = Engine(model, wanted, options=options, eos_ids=eos_ids)
    try:
      for request in requests:
        engine.submit(request)
      return engine
    except UserError:
      if model.idle_engines:
        model.idle_engines.clear()
      elif slots or wanted == 1:
        raise
      else:
        wanted //= 2


def give_back(engine: Engine) -> None:
  """Keeps an engine for the next call; the one that waited longest goes."""
  kept = engine.model.idle_engines
  kept.append(engine)
  del kept[:-_MOST_ENGINES]


def _slots_for(model: Model, options: Options, rows: int) -> int:
  short = _SHORT_PASS.get(jax.default_backend(), _SHORT_PASS_ELSEWHERE)
  for slots in _SLOTS:
    if rows <= slots and slots * settings_for(model, options, slots).tokens <= short:
      return slots
  return min(1 << max(rows - 1, 0).bit_length(), _MOST_SLOTS)
