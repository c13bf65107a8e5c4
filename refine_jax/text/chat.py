"""Chat data: what text a prompt and a response become, and where one ends.

Prompt and response are tokenised separately and their ids joined. So the boundary is exact even
where a merge of the tokenizer would cross it, and the prompt's ids are those that inference sees.
"""

import dataclasses
from typing import Any

from refine_jax.errors import UserError
from refine_jax.quoting import cut
from refine_jax.text import template
from refine_jax.text.tokenizer import Tokenizer, encode

_THINK = "<think>"
# Fields of a message that are part of what the model says; any other may be left out.
_SAID = ("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")


class BadExample(Exception):
  """Why a row is dropped; counted and printed by reason."""


@dataclasses.dataclass(frozen=True)
class Texts:
  """An example's text.

  Attributes:
    prompt: up to where the assistant's answer begins.
    response: what follows, without EOS.
    left_out: fields of the response that are not in it.
  """

  prompt: str
  response: str
  left_out: tuple[str, ...] = ()


def check_tokenizer(tokenizer: Tokenizer, fallback_template: str = "") -> None:
  """Raises UserError where the tokenizer lacks what training needs, with what to set."""
  if tokenizer.eos_token_id is None:
    raise UserError(
      f"The tokenizer {template.name(tokenizer)} has no EOS token; set eos_token in its"
      " tokenizer_config.json."
    )
  template.check(tokenizer, fallback_template)


def prompt_text(tokenizer: Tokenizer, prompt: object, fallback_template: str = "") -> str:
  """The prompt through the chat template, up to where the assistant's answer begins.

  Args:
    prompt: a string, which becomes one user message, or a list of {"role", "content"}. Fields
      that are null, at any depth, are absent: Parquet gives each struct of a column the fields of
      all. Content may be null next to tool calls, and then is absent too.
    fallback_template: used where the tokenizer has no template.

  Raises:
    BadExample: neither of the two, or a conversation that the template refuses.
    UserError: the template has no end.
  """
  return _rendered(tokenizer, _conversation(prompt), fallback_template)


def example_texts(
  tokenizer: Tokenizer, prompt: object, response: object, fallback_template: str = ""
) -> Texts:
  """Prompt and response as texts, the response without the EOS that it may end in.

  Templates are not applied to a response's content: some of them strip the reasoning out. Where
  the prompt's text ends in a `<think>` that the template has opened, one at the response's start is
  dropped, with its line break if the prompt has that too.

  A response with more than content (tool calls, reasoning) is what the chat template writes of
  it after the prompt.

  Args:
    prompt, fallback_template: as in `prompt_text`.
    response: a string, or a list of one message, the assistant's. Of several, only the last
      would follow the prompt, and the rows that have them mean different things by it.

  Raises:
    BadExample: a bad prompt or response; tool calls or reasoning that the template does not write.
    UserError: the template has no end.
  """
  conversation = _conversation(prompt)
  text = _rendered(tokenizer, conversation, fallback_template)
  target = _target(response)
  fields = [k for k, v in target.items() if k not in ("role", "content") and v not in ("", [], {})]

  def whole(message):
    return _rendered(tokenizer, [*conversation, message], fallback_template, generate=False)

  def matters(field):
    try:
      return whole({k: v for k, v in target.items() if k != field}) != written
    except BadExample:
      return True

  written = whole(target) if fields else ""
  left_out = tuple(field for field in fields if not matters(field))
  for field in left_out:
    if field in _SAID:
      raise BadExample(f"target with {field}, which the chat template does not print")
  if len(left_out) == len(fields):
    said = target.get("content", "")
  elif written.startswith(text):
    said = written[len(text) :]
  else:
    names = ", ".join(field for field in fields if field not in left_out)
    raise BadExample(f"target with {cut(names)}: the chat template changes the prompt for it")
  return Texts(text, _said(said, text, tokenizer.eos_token), tuple(map(cut, left_out)))


def _said(text: str, prompt: str, eos: str) -> str:
  if prompt.rstrip().endswith(_THINK) and text.lstrip().startswith(_THINK):
    text = text.lstrip()[len(_THINK) :]
    if prompt.endswith("\n"):
      text = text.removeprefix("\n")
  while eos and text.rstrip().endswith(eos):
    text = text.rstrip().removesuffix(eos)
  if not text.strip():
    raise BadExample("empty target")
  return _unicode(text)


def encode_prompt(
  tokenizer: Tokenizer, prompt: object, chat_template: str = "", name: str = "The prompt"
) -> list[int]:
  """A prompt's ids, as in training: the one path for training and sampling.

  Args:
    name: what errors call it.

  Raises:
    UserError: no chat template, or not a prompt.
  """
  template.check(tokenizer, chat_template)
  try:
    text = prompt_text(tokenizer, prompt, chat_template)
  except BadExample as error:
    raise UserError(f"{name} is no prompt: {error}; give a string or chat messages.") from error
  ids = encode(tokenizer, [text])[0]
  if not ids:
    raise UserError(f"{name} has no tokens; give one that is not empty.")
  return ids


def with_eos(ids: list[int], eos: int) -> list[int]:
  """The ids ended by one EOS, not two."""
  end = len(ids)
  while end and ids[end - 1] == eos:
    end -= 1
  return [*ids[:end], eos]


def _rendered(tokenizer, messages, fallback_template, *, generate=True) -> str:
  """The conversation's text.

  Raises:
    BadExample: the template refuses it, or leaves out calls that are a message's only content.
  """

  def render(messages):
    return template.render(tokenizer, messages, fallback_template, add_generation_prompt=generate)

  try:
    try:
      text = render(messages)
    except template.Refused:
      filled = [{"content": ""} | m for m in messages]  # some templates add it to other text
      if filled == messages:
        raise
      text = render(filled)
    silent = [m if "content" in m else {"role": m["role"], "content": ""} for m in messages]
    if silent != messages and any(_calls(m) for m in messages) and render(silent) == text:
      raise BadExample("calls next to null content, which the chat template does not print")
  except template.Refused as error:
    raise BadExample(str(error)) from error
  return _unicode(text)


def _unicode(text: str) -> str:
  try:
    text.encode()
  except UnicodeEncodeError:  # lone surrogates: bytes that were no text
    raise BadExample("not valid Unicode") from None
  return text


def _conversation(prompt) -> list[dict]:
  if isinstance(prompt, str):
    return [{"role": "user", "content": prompt}]
  return _messages(prompt)


def _target(response) -> dict:
  if isinstance(response, str):
    return {"role": "assistant", "content": response}
  messages = _messages(response)
  if len(messages) != 1:
    raise BadExample("target of several messages")
  if messages[0]["role"] != "assistant":
    raise BadExample("target not the assistant's")
  return messages[0]


def _messages(value) -> list[dict]:
  if value is None:
    raise BadExample("null")
  if not isinstance(value, list) or not value:
    raise BadExample("not a string or messages")
  return [_message(m) for m in value]


def _message(value) -> dict:
  if not isinstance(value, dict) or not isinstance(value.get("role"), str):
    raise BadExample("not a string or messages")
  try:
    message = _without_nulls(value)
  except RecursionError:  # JSON lines may be as deep as Python's own limit
    raise BadExample("nested too deeply") from None
  if not isinstance(message.get("content", "" if _calls(message) else None), str):
    raise BadExample("not a string or messages")
  return message


def _calls(message: dict) -> bool:
  return any(message.get(name) for name in ("tool_calls", "function_call"))


def _without_nulls(value: Any) -> Any:
  """The value without the fields that are null, at any depth; templates test for presence."""
  if isinstance(value, dict):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_nulls(v) for v in value]
  return value
