"""Chat templates: what text a prompt and a response become, and where one ends.

Prompt and response are tokenised apart and their ids joined. So the boundary is exact even where
a merge of the tokenizer would cross it, and the prompt's ids are those that inference sees.
"""

import jinja2

from refine_jax.errors import UserError

_THINK = "<think>"


class BadExample(Exception):
  """Why a row is dropped; counted and printed by reason."""


def check_tokenizer(tokenizer, fallback_template: str = ""):
  """Raises UserError where the tokenizer lacks what training needs, with what to set."""
  name = _name(tokenizer)
  if tokenizer.eos_token_id is None:
    raise UserError(
      f"The tokenizer {name} has no EOS token; set eos_token in its tokenizer_config.json."
    )
  _check_template(tokenizer, fallback_template)


def _check_template(tokenizer, fallback_template):
  name = _name(tokenizer)
  if not tokenizer.chat_template and not fallback_template:
    raise UserError(
      f"The tokenizer {name} has no chat template; set config.data.chat_template to one"
      " (a Jinja string)."
    )
  try:
    _render(tokenizer, [{"role": "user", "content": "a"}], fallback_template)
  except (jinja2.TemplateSyntaxError, ValueError) as error:
    whose = (
      f"The chat template of {name}" if tokenizer.chat_template else "config.data.chat_template"
    )
    raise UserError(f"{whose} cannot be used: {error}") from error
  except jinja2.TemplateError:
    pass  # It may refuse this conversation and take those of the data.


def _name(tokenizer) -> str:
  return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _render(tokenizer, messages, fallback_template) -> str:
  template = None if tokenizer.chat_template else fallback_template
  return tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True, chat_template=template
  )


def prompt_text(tokenizer, prompt, fallback_template: str = "") -> str:
  """The prompt through the chat template, up to where the assistant's answer begins.

  Args:
    prompt: a string, which becomes one user message, or a list of {"role", "content"}.
    fallback_template: used where the tokenizer has no template.

  Raises:
    BadExample: neither of the two, or a conversation that the template refuses.
  """
  if isinstance(prompt, str):
    messages = [{"role": "user", "content": prompt}]
  else:
    messages = _messages(prompt)
  try:
    return _render(tokenizer, messages, fallback_template)
  except (jinja2.TemplateError, TypeError) as error:
    raise BadExample(f"refused by the chat template: {error}") from error


def response_text(response, prompt: str, eos: str = "") -> str:
  """The response as it follows the rendered prompt, without the EOS that it may end in.

  Where the template has already opened the reasoning, a `<think>` at the response's start is
  dropped, with its line break if the prompt has that too; everything else is kept. Templates
  are not applied to responses: some of them strip the reasoning out.

  Args:
    response: a string, or a list of one message, the assistant's. Of several, only the last
      would follow the prompt, and the rows that have them mean different things by it.
    prompt: as `prompt_text` gives it.
    eos: the text of EOS.

  Raises:
    BadExample: not one of the two, or empty.
  """
  if response is None:
    raise BadExample("null")
  if not isinstance(response, str):
    messages = _messages(response)
    if len(messages) != 1:
      raise BadExample("target of several messages")
    if messages[0]["role"] != "assistant":
      raise BadExample("target not the assistant's")
    response = messages[0]["content"]
  if prompt.rstrip().endswith(_THINK) and response.lstrip().startswith(_THINK):
    response = response.lstrip()[len(_THINK) :]
    if prompt.endswith("\n"):
      response = response.removeprefix("\n")
  while eos and response.rstrip().endswith(eos):
    response = response.rstrip().removesuffix(eos)
  if not response.strip():
    raise BadExample("empty target")
  return response


def encode_prompt(
  tokenizer, prompt, chat_template: str = "", name: str = "The prompt"
) -> list[int]:
  """A prompt's ids, as in training: the one path for training and sampling.

  Args:
    name: what errors call it.

  Raises:
    UserError: no chat template, or not a prompt.
  """
  _check_template(tokenizer, chat_template)
  try:
    text = prompt_text(tokenizer, prompt, chat_template)
  except BadExample as error:
    raise UserError(f"{name} is no prompt: {error}; give a string or chat messages.") from error
  try:
    text.encode()
  except UnicodeEncodeError:  # lone surrogates: bytes that were no text
    raise UserError(f"{name} is not valid Unicode.") from None
  ids = encode(tokenizer, [text])[0]
  if not ids:
    raise UserError(f"{name} has no tokens; give one that is not empty.")
  return ids


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
  """Ids of texts that hold their special tokens already; in parallel where it is a fast one."""
  # Not verbose: the tokenizer would warn of texts beyond its own limit, which we truncate.
  return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
    "input_ids"
  ]


def with_eos(ids: list[int], eos: int) -> list[int]:
  """The ids ended by one EOS, not two."""
  end = len(ids)
  while end and ids[end - 1] == eos:
    end -= 1
  return [*ids[:end], eos]


def _messages(value) -> list[dict]:
  if value is None:
    raise BadExample("null")
  good = (
    isinstance(value, list)
    and value
    and all(
      isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
      for m in value
    )
  )
  if not good:
    raise BadExample("not a string or messages")
  # Parquet fills absent fields of a struct with null; templates test for presence.
  return [{k: v for k, v in m.items() if v is not None} for m in value]
