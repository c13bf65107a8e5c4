"""OpenAI's answers as JSON, whole and by pieces."""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from refine_jax.decoding import trace_html
from refine_jax.decoding.call import gathered
from refine_jax.decoding.loading import Model
from refine_jax.decoding.requests import Answer
from refine_jax.decoding.result import token_texts
from refine_jax.decoding.runner import Costs
from refine_jax.decoding.scores import Scores
from refine_jax.serving.choices import Choice
from refine_jax.serving.protocol import Asked
from refine_jax.serving.served import Served
from refine_jax.text import detokenize

DONE = b"data: [DONE]\n\n"


def encoded(value: dict) -> bytes:
  """JSON in ASCII: what is no Unicode in a request cannot break its answer."""
  return json.dumps(value, separators=(",", ":")).encode()


def event(value: dict) -> bytes:
  """A server-sent event."""
  return b"data: " + encoded(value) + b"\n\n"


class Reply:
  """What answers one request."""

  def __init__(self, served: Served, asked: Asked) -> None:
    self._served, self._asked = served, asked
    self._chat = asked.kind == "chat"
    kind = "chat.completion" if self._chat else "text_completion"
    self._head = {
      "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
      "object": kind,
      "created": int(time.time()),
      "model": served.name,
    }
    chunk = "chat.completion.chunk" if self._chat else kind
    self._chunk_head = self._head | {"object": chunk}

  def whole(self, choices: list[Choice], scores: Sequence[Scores | None]) -> dict:
    """The answer of a request that does not stream.

    Args:
      choices: one a request of the engine.
      scores: of each choice's prompt and answer, where log-probabilities were asked for.
    """
    shown = []
    for choice, score in zip(choices, scores, strict=True):
      logprobs = None if score is None else self._logprobs(choice, score)
      shown.append(self._choice(choice, self._echoed(choice) + choice.text, logprobs))
    return self._head | {"choices": shown, "usage": self._usage(choices)} | self._extra(choices)

  def first(self) -> list[dict]:
    """The pieces before any text: a chat's role, and prompts that are to be echoed."""
    rows = range(len(self._asked.requests))
    if self._chat:
      return [self._chunk(index, {"role": "assistant", "content": ""}) for index in rows]
    if not self._asked.echo:
      return []
    prompts = enumerate(self._asked.requests)
    return [self._chunk(index, self._decoded(request.prompt)) for index, request in prompts]

  def piece(self, choice: Choice, text: str) -> dict:
    """A piece of an answer; the last of a choice says why it ended."""
    delta = ({"content": text} if text else {}) if self._chat else text
    return self._chunk(choice.index, delta, choice.reason)

  def last(self, choices: list[Choice]) -> list[dict]:
    """What follows the pieces: usage and passes, where they were asked for."""
    extra = self._extra(choices)
    if self._asked.include_usage:
      extra |= {"usage": self._usage(choices)}
    return [self._chunk_head | {"choices": []} | extra] if extra else []

  def _chunk(self, index: int, delta: Any, reason: str | None = None) -> dict:
    body = {"delta": delta} if self._chat else {"text": delta}
    choice = {"index": index} | body | {"logprobs": None, "finish_reason": reason}
    return self._chunk_head | {"choices": [choice]}

  def _choice(self, choice: Choice, text: str, logprobs: dict | None) -> dict:
    body: dict[str, Any] = {"text": text}
    if self._chat:
      body = {"message": {"role": "assistant", "content": text, "refusal": None}}
    more = {"logprobs": logprobs, "finish_reason": choice.reason}
    return {"index": choice.index} | body | more

  def _usage(self, choices: list[Choice]) -> dict:
    prompt = sum(map(len, self._asked.prompts))
    tokens = sum(len(choice.tokens) for choice in choices)
    passes = sum(choice.passes for choice in choices)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": tokens,
      "total_tokens": prompt + tokens,
      "passes": passes,
      "tokens_per_pass": round(tokens / passes, 4) if passes else None,
    }

  def _extra(self, choices: list[Choice]) -> dict:
    """The passes as a page, where they were asked for."""
    if not self._asked.trace:
      return {}
    answers = [
      Answer(c.request, c.tokens, c.text, _engine_reason(c), c.passes, [], c.trace) for c in choices
    ]
    # What a row costs alone is not known where several share the passes.
    generation = gathered(self._served.model, answers, Costs())
    page = trace_html.page(generation, "Passes", numbers=False)
    return {"refine_jax": {"trace_html": page}}

  def _echoed(self, choice: Choice) -> str:
    return self._decoded(choice.request.prompt) if self._asked.echo else ""

  def _decoded(self, ids: list[int]) -> str:
    return detokenize.decode(self._served.model.require_tokenizer(), ids)

  def _logprobs(self, choice: Choice, scores: Scores) -> dict:
    """A choice's log-probabilities, as completions or as chats have them."""
    prompt, top = choice.request.prompt, self._asked.logprobs or 0
    start = 0 if self._asked.echo else len(prompt)
    ids = [*prompt, *choice.tokens][start:]
    texts = _Texts(self._served.model, [*ids, *scores.top_ids.ravel().tolist()])
    rows = [_Row(token, None, []) for token in ids[: 1 if start == 0 else 0]]
    for place, token in enumerate(ids[len(rows) :], start + len(rows) - 1):
      best = zip(scores.top_ids[place].tolist(), scores.top[place].tolist(), strict=True)
      rows.append(_Row(token, float(scores.tokens[place]), list(best)[:top]))
    return _chat_logprobs(rows, texts) if self._chat else _completion_logprobs(rows, texts)


@dataclasses.dataclass(frozen=True)
class _Row:
  token: int
  logprob: float | None  # of the first token of a text there is none
  top: list[tuple[int, float]]


class _Texts(dict):
  """The text of every id."""

  def __init__(self, model: Model, ids: list[int]) -> None:
    super().__init__(token_texts(model.tokenizer, dict.fromkeys(ids)))


def _completion_logprobs(rows: list[_Row], texts: _Texts) -> dict:
  offsets, offset = [], 0
  for row in rows:
    offsets.append(offset)
    offset += len(texts[row.token])
  tops: list[dict | None] = []
  for row in rows:
    top: dict[str, float] = {}
    for token, value in row.top:
      top.setdefault(texts[token], value)  # the better one of two with one text
    tops.append(top if row.logprob is not None and top else None)
  return {
    "tokens": [texts[row.token] for row in rows],
    "token_logprobs": [row.logprob for row in rows],
    "top_logprobs": tops,
    "text_offset": offsets,
  }


def _chat_logprobs(rows: list[_Row], texts: _Texts) -> dict:
  def entry(token, value):
    text = texts[token]
    return {"token": text, "logprob": value, "bytes": list(text.encode())}

  content = [
    entry(row.token, row.logprob) | {"top_logprobs": [entry(*one) for one in row.top]}
    for row in rows
  ]
  return {"content": content, "refusal": None}


def _engine_reason(choice: Choice) -> str:
  return "eos" if choice.reason == "stop" else "length"
