"""Rows in slots: prompts enter by pieces, rows decode together, a slot that ends is refilled."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options
from refine_jax.decoding.plans import Chooser, Plan
from refine_jax.decoding.requests import Answer, Request, Row
from refine_jax.decoding.runner import Costs, Runner
from refine_jax.decoding.settings import Settings, settings_for, static
from refine_jax.decoding.unread import Unread
from refine_jax.errors import UserError
from refine_jax.interrupt import held_back

# Passes between two looks of the host: at texts that may hold a stop string, and at all others.
_PASSES_BETWEEN_STOPS, _PASSES = 8, 32
_DEFAULTS = Options()


class Engine:
  """Answers requests in a fixed number of slots, as many at a time.

  All rows share the model, the mode, the draft kind and the block size, which make its programs;
  every other option is a row's own. Programs put pieces of prompts into the caches, run passes, and
  run a pass that is traced. Caches have as many places as the longest row needs, a power of two.

  An interrupt (SIGINT) waits for the end of a step: then answers are whole, and the engine can go
  on. One thread may use an engine at a time.
  """

  def __init__(
    self,
    model: Model,
    slots: int = 8,
    context: int | None = None,
    options: Options = _DEFAULTS,
    *,
    eos_ids: int = 0,
  ) -> None:
    """Makes an engine; memory is taken when the first request enters.

    Args:
      slots: rows that decode at a time.
      context: the most tokens of a row, prompt included; default: the model's.
      options: whose mode, draft and block_size it has.
      eos_ids: how many a row has at most, where that is more than eight.
    """
    self.model = model
    self.slots = slots
    self.context = min(context or model.config.max_length, model.config.max_length)
    self._runner = Runner(model, slots, settings_for(model, options, slots, eos_ids))
    found = self._runner.settings.plans
    self._chooser = Chooser(found) if found else None
    self._suited: set[tuple] = set()  # what requests asked for, where it was found to fit
    self._waiting: collections.deque[Request] = collections.deque()
    self._rows: list[Row | None] = [None] * slots
    self._unread = Unread()
    self._finished: list[Answer] = []
    self._lengths = np.ones(slots, np.int32)
    self._ended = np.zeros(slots, bool)  # rows that the device does not know to be done

  @property
  def settings(self) -> Settings:
    """What its programs are made for."""
    return self._runner.settings

  @property
  def costs(self) -> Costs:
    """What it has spent so far."""
    return dataclasses.replace(self._runner.costs)

  @property
  def busy(self) -> bool:
    """Whether a request waits or is on its way."""
    return bool(self._waiting or self._finished or self._unread) or any(self._rows)

  def submit(self, request: Request) -> None:
    """Adds a request, which enters when a slot is free.

    Raises:
      UserError: as in `check`.
    """
    self.check(request)
    self._waiting.append(request)

  def check(self, request: Request) -> None:
    """Raises UserError where a request needs what the engine or the device does not have.

    That is other programs, more places than the context has, or more memory.
    """
    options, eos_ids = request.options, len(request.eos_ids)
    asked = (*static(options), eos_ids)
    if asked not in self._suited:  # most requests ask for what others did
      self.settings.require(settings_for(self.model, options, self.slots, eos_ids), eos_ids)
      self._suited.add(asked)
    if len(request.prompt) >= self.context:
      raise UserError(
        f"A prompt has {len(request.prompt)} tokens, which leaves no room in the engine's"
        f" context of {self.context}."
      )
    self._runner.check_memory(self._places(request))

  def warm_up(self, tokens: int = 0, *, traced: bool = False, samples: bool = False) -> Costs:
    """Compiles the programs for rows of up to so many tokens, and returns what that took.

    Args:
      traced, samples: of rows that are traced, or have a temperature.
    """
    before = self.costs
    self._runner.grow(tokens + max(self.settings.reach, self._runner.piece))
    plans = [self.settings.planned(plan) for plan in self._chooser.plans] if self._chooser else ()
    self._runner.prepare(traced=traced, samples=samples, plans=plans)
    return self.costs.since(before)

  def use(self, plans: Sequence[Plan]) -> None:
    """Chooses between these plans from now on, all of them with the settings' own blocks."""
    self._chooser = Chooser(plans)

  def step(self, passes: int | None = None) -> list[Answer]:
    """Lets waiting requests enter, runs some passes, and returns the answers that ended.

    Args:
      passes: at most; fewer where a slot becomes free that a request waits for. Default: 8 where
        the host has to look for stop strings, else 32; answers then come with the next step, if
        there is one: the host makes them beside its passes, on a GPU after them.
    """
    self.prepare()
    with held_back():
      self._admit()
      self._enter_some()
      if self._decoding():
        traced = any(row and row.request.options.trace for row in self._rows)
        self._finished += self._traced(passes or 1) if traced else self._decode(passes)
      self._runner.wait()
      if not (self._waiting or any(self._rows)):  # no other step follows
        self._finished += self._unread.take()
    # Of a step that was interrupted they come with the next one.
    finished, self._finished = self._finished, []
    return finished

  def prepare(self) -> None:
    """Grows the caches and compiles what the next step needs; an interrupt here loses nothing."""
    free = self._rows.count(None)
    coming = [self._waiting[i] for i in range(min(free, len(self._waiting)))]
    if coming:
      self._runner.grow(max(map(self._places, coming)))
    if self._chooser:
      self._runner.plan = self.settings.planned(self._chooser.current)
    requests = [row.request for row in self._rows if row] + coming
    if requests:
      self._runner.prepare(
        traced=any(request.options.trace for request in requests),
        samples=any(request.options.temperature > 0 for request in requests),
      )

  def entered(self, requests: Iterable[Request]) -> Runner:
    """Puts requests into free slots, runs no pass, and returns the runner: for measurements."""
    for request in requests:
      self.submit(request)
    self.prepare()
    self._admit()
    while entering := self._entering():
      self._enter(entering[: self._runner.pieces])
    self._runner.wait()
    return self._runner

  def progress(self) -> dict[Request, Answer]:
    """What there is of the answers of requests that have a slot, or had one in the last step."""
    with held_back():
      self._finished += self._unread.take()
      decoding, nothing = self._decoding(), [0] * self.settings.most
      tokens, accepted, sure = self._runner.fetch() if decoding else (np.zeros(0),) * 3
      for slot in decoding:
        self._row(slot).see(self._new_tokens(tokens, slot), False, sure, slot)
      return {answer.request: answer for answer in self._finished} | {
        row.request: row.answer(False, accepted[slot].tolist() if slot in decoding else nothing)
        for slot, row in enumerate(self._rows)
        if row is not None
      }

  def certain_text(self, request: Request) -> str:
    """What no further token can change of the text of a request that has a slot."""
    return next((r.certain_text for r in self._rows if r and r.request is request), "")

  def new_tokens(self, known: Mapping[Request, int]) -> dict[Request, tuple[list[int], int]]:
    """The tokens of answers after the known ones, and the passes, of requests that decode."""
    rows = {slot: row for slot in self._decoding() if (row := self._row(slot)).request in known}
    tokens = self._runner.fetch()[0] if rows else np.zeros(0)
    return {
      row.request: (self._new_tokens(tokens, slot)[known[row.request] :], row.passes)
      for slot, row in rows.items()
    }

  def cancel(self, request: Request) -> None:
    """Ends a request without an answer; its slot is free for the next one."""
    with held_back():
      if request in self._waiting:
        self._waiting.remove(request)
      self._unread.drop(request)
      for slot, row in enumerate(self._rows):
        if row is not None and row.request is request:
          self._rows[slot], self._ended[slot] = None, True

  def _admit(self) -> None:
    for slot, row in enumerate(self._rows):
      if row is None and self._waiting:
        self._rows[slot] = Row(self.model, self._waiting.popleft(), self.context)

  def _enter_some(self) -> None:
    """Enters pieces of prompts: until most rows decode, or once beside those that do."""
    while entering := self._entering():
      self._enter(entering[: self._runner.pieces])
      if len(self._decoding()) >= len(self._entering()):
        break

  def _enter(self, slots: list[int]) -> None:
    sent, pieces = self._runner.sent_pieces()
    ahead = self.settings.drafts_of_prompt
    for i, slot in enumerate(slots):
      row = self._row(slot)
      row.put_piece(pieces, i, slot, ahead)
      self._ended[slot] = False
      self._lengths[slot] = len(row.request.prompt)
    self._runner.enter(sent)

  def _decode(self, passes: int | None) -> list[Answer]:
    watched = any(row and row.request.watched for row in self._rows)
    later = passes is None and not watched
    passes = passes or (_PASSES_BETWEEN_STOPS if watched else _PASSES)
    least = 1
    if self._entering():
      passes = 1  # beside the next piece
    elif self._waiting:
      # As many rows as a pass over pieces takes, but never many slots at rest.
      enough = min(self._runner.pieces, self.slots // 8, len(self._waiting))
      least = max(len(self._decoding()) - max(enough, 1) + 1, 1)
    self._runner.start(self._ended, passes, least)
    return self._unread.take() + self._collect(self._runner.report(), later=later)

  def _traced(self, passes: int) -> list[Answer]:
    finished = self._unread.take()
    while passes and not finished and self._decoding():
      before = self._lengths.copy()
      report, seen = self._runner.traced_pass(self._ended)
      for slot in self._decoding():
        self._row(slot).record(seen, slot, int(before[slot]))
      finished = self._collect(report)
      passes -= 1
    return finished

  def _collect(self, report: np.ndarray, *, later: bool = False) -> list[Answer]:
    """Frees the slots of rows that ended; their answers are `later` left to the next step."""
    self._ended[:] = False
    lengths, passes, done = report
    decoding = self._decoding()
    if self._chooser:
      new = int(np.sum(lengths[decoding] - self._lengths[decoding]))
      took = int(np.sum(passes[decoding])) - sum(self._row(slot).passes for slot in decoding)
      self._chooser.observe(new, took)
    self._lengths[decoding] = lengths[decoding]
    for slot in decoding:
      self._row(slot).passes = int(passes[slot])
    ended = {slot: self._row(slot) for slot in decoding if done[slot]}
    self._unread.add(ended, lengths, self._runner.rows)
    watched = [s for s in decoding if not done[s] and self._row(s).request.watched]
    tokens, accepted, sure = jax.device_get(self._runner.rows) if watched else (np.zeros(0),) * 3
    finished = []
    for slot in watched:
      row = self._row(slot)
      if row.see(self._new_tokens(tokens, slot), False, sure, slot):
        finished.append(row.answer(True, accepted[slot].tolist()))
        self._rows[slot], self._ended[slot] = None, True
    for slot in ended:
      self._rows[slot] = None
    return finished if later else finished + self._unread.take()

  def _decoding(self) -> list[int]:
    return [slot for slot, row in enumerate(self._rows) if row and row.decodes]

  def _entering(self) -> list[int]:
    return [slot for slot, row in enumerate(self._rows) if row and not row.decodes]

  def _row(self, slot: int) -> Row:
    row = self._rows[slot]
    assert row is not None
    return row

  def _new_tokens(self, tokens: np.ndarray, slot: int) -> list[int]:
    return tokens[slot, len(self._row(slot).request.prompt) : self._lengths[slot]].tolist()

  def _places(self, request: Request) -> int:
    """Places of the cache that a request needs: what its last passes, or its last piece, write."""
    count = len(request.prompt)
    limit = min(count + min(int(request.options.max_new_tokens), self.context), self.context)
    return max(limit + self.settings.reach, count + self._runner.piece)
