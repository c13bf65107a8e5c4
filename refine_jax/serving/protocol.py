"""OpenAI's requests, read as requests of the engine: every field honoured, or refused by name."""

import dataclasses
import secrets
from typing import Any

from refine_jax.decoding.prompts import prompt_ids
from refine_jax.decoding.requests import Request
from refine_jax.decoding.requests import requests as decoding_requests
from refine_jax.errors import UserError
from refine_jax.serving.fields import Fields
from refine_jax.serving.refusals import Refused, too_long
from refine_jax.serving.served import Served
from refine_jax.text.tokenizer import encode_start

MOST_LOGPROBS = {"completion": 5, "chat": 20}
_COMPLETION_TOKENS = 16  # OpenAI's default
_STOPS, _STOP_LENGTH = 16, 1000
# Fields that say nothing of the answer.
_IGNORED = frozenset(
  ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
  + ("parallel_tool_calls",)  # there are no tools
)
# Fields that are not supported, with the values that ask for nothing.
_ZERO, _EMPTY = (0, 0.0), ([], {}, "")
_NEUTRAL = {
  "presence_penalty": _ZERO,
  "frequency_penalty": _ZERO,
  "logit_bias": _EMPTY,
  "store": (False,),
}
_NEUTRAL_COMPLETION = _NEUTRAL | {"suffix": _EMPTY}
_NEUTRAL_CHAT = _NEUTRAL | {
  "tools": _EMPTY,
  "tool_choice": ("none", "auto"),
  "functions": _EMPTY,
  "function_call": ("none", "auto"),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "prediction": (),
  "audio": (),
  "reasoning_effort": (),
  "verbosity": (),
  "web_search_options": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """What a request asks for.

  Attributes:
    kind: "completion" or "chat".
    prompts: as ids.
    n: answers to each.
    requests: the n of the first prompt, then those of the second.
    generates: whether anything is to follow the prompts, or they are to be scored alone.
    stream: whether the answer comes by pieces.
    include_usage: whether the last piece says what it cost.
    echo: whether a text begins with its prompt.
    logprobs: how many of the likeliest tokens are named; None: no log-probabilities.
    trace: whether the passes are shown.
  """

  kind: str
  prompts: list[list[int]]
  n: int
  requests: list[Request]
  generates: bool
  stream: bool
  include_usage: bool
  echo: bool = False
  logprobs: int | None = None
  trace: bool = False


def read(kind: str, served: Served, body: bytes) -> Asked:
  """Reads the body of a request.

  Args:
    kind: "completion" or "chat".

  Raises:
    Refused: says what is wrong.
  """
  try:
    fields = Fields(body)
    _check_model(fields, served)
    return (_completion if kind == "completion" else _chat)(fields, served)
  except UserError as error:
    raise Refused(400, str(error)) from error
  except RecursionError:
    raise Refused(400, "The body is too deep.", code="invalid_json") from None


def _completion(fields: Fields, served: Served) -> Asked:
  given = _prompts(fields)
  _check_rows(served, len(given), 1)
  prompts = [_ids(served, prompt) for prompt in given]
  echo = fields.truth("echo")
  logprobs = fields.whole("logprobs", None, 0, MOST_LOGPROBS["completion"])
  new = _most_new(fields, served, prompts, _COMPLETION_TOKENS, least=0 if echo else 1)
  n = fields.whole("n", 1, 1, served.limits.rows)
  best_of = fields.value("best_of", n)
  if best_of != n:
    raise Refused(400, "best_of is not supported beyond n; leave it out.", param="best_of")
  return _asked("completion", fields, served, prompts, n, new, echo=echo, logprobs=logprobs)


def _chat(fields: Fields, served: Served) -> Asked:
  if not served.chats:
    raise Refused(
      400,
      "The model has no chat template; start the server with --chat_template, or use"
      " /v1/completions.",
      param="messages",
    )
  messages = fields.value("messages")
  good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
  fields.require("messages", bool(good), "a list of messages, of at least one")
  messages = [m | {"content": _content(m.get("content"))} for m in messages]
  template = served.options.chat_template
  if served.model.require_tokenizer().chat_template:
    template = ""
  prompts = [prompt_ids(served.model, messages, template, "messages")]
  wanted = fields.truth("logprobs")
  top = fields.whole("top_logprobs", None, 0, MOST_LOGPROBS["chat"])
  if top is not None and not wanted:
    raise Refused(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
  new = _most_new(fields, served, prompts, None, least=1)
  n = fields.whole("n", 1, 1, served.limits.rows)
  logprobs = (top or 0) if wanted else None
  return _asked("chat", fields, served, prompts, n, new, logprobs=logprobs)


def _asked(kind, fields, served, prompts, n, new, *, echo=False, logprobs=None) -> Asked:
  limits = served.limits
  _check_rows(served, len(prompts), n)
  stream = fields.truth("stream")
  if stream and (logprobs is not None or (echo and not new)):
    param = "logprobs" if logprobs is not None else "max_tokens"
    message = f"{param} is not supported with stream; leave stream out."
    raise Refused(400, message, param=param, code="unsupported_parameter")
  trace = fields.truth("trace")
  if trace and (new > limits.trace_tokens or len(prompts) * n > 1):
    message = f"trace goes with one answer, and max_tokens of at most {limits.trace_tokens}."
    if not limits.trace_tokens:
      message = "This server shows no passes (--trace_tokens=0); leave trace out."
    raise Refused(400, message, param="trace")
  options = dataclasses.replace(
    served.options,
    max_new_tokens=max(new, 1),
    temperature=fields.number("temperature", 1.0, 0.0, 100.0),
    top_p=fields.number("top_p", 1.0, 0.0, 1.0),
    top_k=max(fields.whole("top_k", 0, -1, 2**31 - 1), 0),
    seed=_seed(fields),
    stop=_stops(fields),
    trace=trace,
    chat_template="",
  )
  include_usage = _include_usage(fields, stream)
  fields.refuse_rest(_NEUTRAL_CHAT if kind == "chat" else _NEUTRAL_COMPLETION, _IGNORED)
  rows = [ids for ids in prompts for _ in range(n)]
  return Asked(
    kind=kind,
    prompts=prompts,
    n=n,
    requests=decoding_requests(served.model, rows, options),
    generates=new > 0,
    stream=stream,
    include_usage=include_usage,
    echo=echo,
    logprobs=logprobs,
    trace=trace,
  )


def _check_model(fields: Fields, served: Served) -> None:
  name = fields.value("model", served.name)
  fields.require("model", isinstance(name, str), "a string")
  if name != served.name:
    message = f"There is no model of that name here; the one that is served is {served.name!r}."
    raise Refused(404, message, param="model", code="model_not_found")


def _check_rows(served: Served, prompts: int, n: int) -> None:
  if prompts * n > served.limits.rows:
    most = served.limits.rows
    message = f"{prompts} prompts times n={n} are more than {most} answers a request."
    raise Refused(400, message, param="n" if n > 1 else "prompt")


def _prompts(fields: Fields) -> list:
  """Texts and lists of ids, at least one."""
  prompt: Any = fields.value("prompt")
  if isinstance(prompt, str):
    return [prompt]
  what = "a text, token ids, or a list of these"
  fields.require("prompt", isinstance(prompt, list) and len(prompt) > 0, what)
  if all(isinstance(i, int) for i in prompt):
    return [prompt]
  fields.require("prompt", all(isinstance(p, str | list) and p != [] for p in prompt), what)
  return prompt


def _ids(served: Served, prompt: str | list) -> list[int]:
  """A prompt's ids; a text is taken as it is, without a chat template."""
  if isinstance(prompt, str):
    prompt = encode_start(served.model.require_tokenizer(), prompt, served.prefix)
    if not prompt:
      raise Refused(400, "The prompt has no tokens; give one that is not empty.", param="prompt")
  if len(prompt) >= served.limits.context:
    raise _beyond(served, len(prompt))
  if any(isinstance(i, bool) or not isinstance(i, int) for i in prompt):
    raise Refused(400, "prompt mixes what is no token id into its ids.", param="prompt")
  return prompt_ids(served.model, prompt, "", "prompt")


def _content(content: object) -> object:
  """A message's content, joined where it comes in parts of text."""
  if not isinstance(content, list):
    return content
  if not all(
    isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    for part in content
  ):
    message = "messages has content that is no text; only parts of type text are supported."
    raise Refused(400, message, param="messages")
  return "".join(part["text"] for part in content)


def _most_new(fields, served, prompts, default: int | None, *, least: int) -> int:
  """The most new tokens: as given, or what the context has room for."""
  limits, longest = served.limits, max(map(len, prompts))
  if longest >= limits.context:
    raise _beyond(served, longest)
  room = limits.context - longest
  given = {
    name: value
    for name in ("max_completion_tokens", "max_tokens")
    if (value := fields.whole(name, None, least, 2**31 - 1)) is not None
  }
  if len(set(given.values())) > 1:
    raise Refused(400, "max_tokens and max_completion_tokens differ.", param="max_tokens")
  if not given:
    return min(default or room, room, limits.max_tokens)
  ((name, value), *_) = given.items()
  if value > limits.max_tokens:
    message = f"{name} is {value}, and the server gives at most {limits.max_tokens} (--max_tokens)."
    raise Refused(400, message, param=name)
  if value > room:
    raise too_long(
      f"A prompt of {longest} tokens and {name} of {value} are more than the server's context of"
      f" {limits.context} tokens.",
      name,
    )
  return value


def _beyond(served: Served, count: int) -> Refused:
  context = served.limits.context
  message = f"A prompt has {count} tokens, which leaves no room in a context of {context}."
  return too_long(message, "prompt")


def _seed(fields: Fields) -> int:
  """The seed, or one of chance; negative ones, which OpenAI allows, wrap around."""
  given = fields.whole("seed", None, -(2**63), 2**63 - 1)
  return secrets.randbits(32) if given is None else given % 2**64


def _stops(fields: Fields) -> tuple[str, ...]:
  stop = fields.value("stop", [])
  stops = [stop] if isinstance(stop, str) else stop
  fields.require("stop", isinstance(stops, list), "a string or a list of strings")
  stops = [s for s in stops if s is not None]
  good = all(isinstance(s, str) and 0 < len(s) <= _STOP_LENGTH for s in stops)
  what = f"at most {_STOPS} strings of 1 to {_STOP_LENGTH} characters"
  fields.require("stop", good and len(stops) <= _STOPS, what)
  return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
  options = fields.value("stream_options", {})
  fields.require(
    "stream_options",
    isinstance(options, dict)
    and set(options) <= {"include_usage", "include_obfuscation"}
    and isinstance(options.get("include_usage", False), bool)
    and not options.get("include_obfuscation"),
    '{"include_usage": true or false}',
  )
  if options and not stream:
    raise Refused(400, "stream_options goes with stream.", param="stream_options")
  return bool(options.get("include_usage", False))
