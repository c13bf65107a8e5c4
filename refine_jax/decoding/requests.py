"""What an engine is asked for and what it gives: Request, Answer, and a row between the two."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options
from refine_jax.decoding.programs import bucket
from refine_jax.decoding.prompts import prompt_ids
from refine_jax.decoding.result import Pass
from refine_jax.decoding.sampler import Seen
from refine_jax.decoding.sampling import NOT_FINITE
from refine_jax.decoding.state import NO_TOKEN, Choices, Pieces
from refine_jax.text import detokenize
from refine_jax.text.vocabulary import check_ids


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One prompt, checked against the model, and how it is to be answered.

  Attributes:
    prompt: token ids.
    options: of its row.
    row: its place among the prompts that share a seed; with the seed it decides a sample.
    follow: whether the text is looked at before it ends.
    noise_token: the id that stands for noise in this row.
    eos_ids: any of them ends the row; special tokens among the stop strings are here.
    stops: strings to look for in the text.
  """

  prompt: list[int]
  options: Options
  row: int
  follow: bool
  noise_token: int
  eos_ids: tuple[int, ...]
  stops: tuple[str, ...]

  @property
  def watched(self) -> bool:
    """Whether the host looks at the text as it grows."""
    return self.follow or bool(self.stops)

  def choices(self, eos_places: int) -> Choices:
    """The values of the row, as numpy scalars and, of EOS ids, an array."""
    options = self.options
    eos = np.full(eos_places, NO_TOKEN, np.int32)
    eos[: len(self.eos_ids)] = self.eos_ids
    samples = options.temperature > 0
    return Choices(
      noise_token=np.int32(self.noise_token),
      eos_ids=eos,
      refine_iter=np.int32(min(options.refine_iter, np.iinfo(np.int32).max)),
      tau=np.float32(options.tau),
      # A product with it is what XLA makes of a division by a constant.
      inverse_temperature=1 / np.float32(options.temperature) if samples else np.float32(0),
      top_k=np.int32(min(options.top_k, np.iinfo(np.int32).max)),
      # The best token stays, however little is asked for.
      top_p=np.float32(max(options.top_p, np.finfo(np.float32).tiny)),
      seed=_seeds(options.seed, bucket(self.row + 1, 64))[self.row],
    )


@functools.lru_cache(4)
def _seeds(seed: int, count: int) -> np.ndarray:
  # Leading numbers do not depend on how many are drawn.
  return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def requests(
  model: Model,
  prompts: Sequence,
  options: Options,
  *,
  rows: Iterable[int] | None = None,
  follow: bool = False,
) -> list[Request]:
  """Makes requests of prompts that share their options.

  Args:
    prompts: strings, chats or token ids, as `generation.generate` takes them.
    rows: the place of each among the prompts of the seed; default: from first_row on.

  Raises:
    UserError: a prompt cannot be answered, or an id of the options is outside the vocabulary.
  """
  special = detokenize.special_ids(model.require_tokenizer()) if options.stops else {}
  given = options.eos_token_id
  eos = model.eos_token_ids if given is None else tuple(np.asarray(given, object).ravel().tolist())
  trained = model.refinement
  default_noise = trained.noise_token if trained else eos[0] if eos else 0
  noise = default_noise if options.noise_token is None else options.noise_token
  stop_ids = [special[s] for s in options.stops if s in special]
  for what, ids in (("eos_token_id", eos), ("noise_token", [noise]), ("stop", stop_ids)):
    check_ids(ids, model.config.vocab_size, what, model.tokenizer)
  places = itertools.count(options.first_row) if rows is None else rows
  return [
    Request(
      prompt_ids(model, prompt, options.chat_template, f"Prompt {row + 1}"),
      options,
      row,
      follow,
      int(noise),
      (*map(int, eos), *stop_ids),
      tuple(s for s in options.stops if s not in special),
    )
    for row, prompt in zip(places, prompts, strict=False)
  ]


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
  """What there is of a request's answer.

  Attributes:
    request: what was asked for.
    tokens: ids without the prompt; the EOS that ended an answer is its last.
    text: the same decoded, special tokens and a stop string left out; None without a tokenizer.
    finish_reason: "eos", "stop", "length", "not_finite" (the model's logits were NaN or infinite
      after `tokens`), or None while it is on its way.
    passes: forward passes that the row took part in after its prompt.
    accepted: for each offset in the block, how many passes committed it.
    trace: every pass, where it was asked for.
    log_probabilities: of each of `tokens`, likewise.
  """

  request: Request
  tokens: list[int]
  text: str | None
  finish_reason: str | None
  passes: int
  accepted: list[int]
  trace: list[Pass] | None = None
  log_probabilities: list[float] | None = None

  @property
  def stopped(self) -> bool:
    """Whether the answer ended by EOS or a stop string, and not by its limit."""
    return self.finish_reason in ("eos", "stop")


class Row:
  """A request in its slot: the host's side of a row of State.

  Attributes:
    request: of the row.
    limit: the most tokens that it may have, prompt included.
    entered: leading tokens of the prompt that are in the cache.
    tokens: of the answer, as far as the host has seen them.
    passes: as in Answer.
    trace: likewise.
    log_probabilities: of the tokens.
  """

  def __init__(self, model: Model, request: Request, context: int) -> None:
    count = len(request.prompt)
    self.request = request
    self.limit = min(count + min(int(request.options.max_new_tokens), context), context)
    self.entered = 0
    self.tokens: list[int] = []
    self.passes = 0
    self.trace: list[Pass] | None = [] if request.options.trace else None
    self.log_probabilities: list[float] | None = None
    self._tokenizer = model.tokenizer
    self._growing = None
    if request.watched:
      self._growing = detokenize.GrowingAnswer(model.require_tokenizer(), request.stops)

  @property
  def decodes(self) -> bool:
    """Whether the prompt is in the cache as a whole."""
    return self.entered == len(self.request.prompt)

  def put_piece(self, pieces: Pieces, i: int, slot: int, ahead: int) -> None:
    """Writes the next piece of the prompt into place i of numpy arrays.

    Args:
      ahead: drafts that the prompt's last piece makes, and has room for.
    """
    prompt, start = self.request.prompt, self.entered
    size, left = pieces.ids.shape[1], len(prompt) - start
    last = left + max(ahead - 1, 0) <= size
    count = left if last else min(size, left - 1)
    for column, value in (
      (pieces.slot, slot),
      (pieces.start, start),
      (pieces.count, count),
      (pieces.last, last),
      (pieces.limit, self.limit),
      *zip(pieces.choices, self.request.choices(pieces.choices.eos_ids.shape[1]), strict=True),
    ):
      column[i] = value
    pieces.ids[i, :count] = prompt[start : start + count]
    self.entered += count

  def record(self, seen: Seen, slot: int, start: int) -> None:
    """Adds a pass that began at place `start` of the row to the trace, if there is one."""
    if self.trace is not None:
      room = self.limit - start
      self.trace.append(
        Pass(
          start - len(self.request.prompt),
          seen.predicted[slot, :room].tolist(),
          seen.probability[slot, :room].tolist(),
          int(seen.count[slot]),
        )
      )

  def see(
    self, tokens: list[int], done: bool, probability: np.ndarray | None = None, slot: int = 0
  ) -> bool:
    """Takes all tokens of the answer so far; returns whether a stop string ends it.

    Args:
      probability: float [B, S], of the tokens of all rows, this one's in row `slot`.
    """
    self.tokens = tokens
    if probability is not None:
      start = len(self.request.prompt)
      own = probability[slot, start : start + len(tokens)]
      self.log_probabilities = np.log(np.maximum(own, np.finfo(np.float32).tiny)).tolist()
    if self._growing is None:
      return False
    finite = tokens[:-1] if NOT_FINITE in tokens[-1:] else tokens
    self._growing.extend(finite[len(self._growing.tokens) :], done)
    return self._growing.stopped

  @property
  def certain_text(self) -> str:
    """What no further token can change of a text that is looked at."""
    return "" if self._growing is None else self._growing.text

  def answer(self, done: bool, accepted: list[int], reason: str | None = None) -> Answer:
    """The answer as far as it is; `reason` where it is not one that the tokens tell."""
    tokens, text = self.tokens, None
    if self._growing is not None and self._growing.stopped:
      tokens, text, reason = self._growing.tokens, self._growing.text, reason or "stop"
    elif NOT_FINITE in tokens[-1:]:
      tokens, reason = tokens[:-1], "not_finite"
    elif done and reason is None:
      reason = "eos" if tokens and tokens[-1] in self.request.eos_ids else "length"
    if text is None and self._tokenizer is not None:
      text = detokenize.decode(self._tokenizer, tokens)
    sure = self.log_probabilities
    return Answer(
      self.request,
      tokens,
      text,
      reason,
      self.passes,
      accepted,
      self.trace,
      None if sure is None else sure[: len(tokens)],
    )
