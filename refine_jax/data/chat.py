"""Chat templates: what text a prompt and a response become, and where one ends.

Prompt and response are tokenised apart and their ids joined. So the boundary is exact even where
a merge of the tokenizer would cross it, and the prompt's ids are those that inference sees.
"""

from refine_jax.errors import UserError

_THINK = "<think>"


class BadExample(Exception):
  """Why a row is dropped; counted and printed by reason."""


def check_tokenizer(tokenizer, fallback_template: str = ""):
  """Raises UserError where the tokenizer lacks what training needs, with what to set."""
  name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
  if tokenizer.eos_token_id is None:
    raise UserError(
      f"The tokenizer {name} has no EOS token; set eos_token in its tokenizer_config.json."
    )
  if not tokenizer.chat_template and not fallback_template:
    raise UserError(
      f"The tokenizer {name} has no chat template; set config.data.chat_template to one"
      " (a Jinja string)."
    )


def prompt_text(tokenizer, prompt, fallback_template: str = "") -> str:
  """The prompt through the chat template, up to where the assistant's answer begins.

  Args:
    prompt: a string, which becomes one user message, or a list of {"role", "content"}.
    fallback_template: used where the tokenizer has no template.

  Raises:
    BadExample: neither of the two.
  """
  if isinstance(prompt, str):
    messages = [{"role": "user", "content": prompt}]
  else:
    messages = _messages(prompt)
  template = None if tokenizer.chat_template else fallback_template
  return tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True, chat_template=template
  )


def response_text(response, prompt: str) -> str:
  """The response as it follows the rendered prompt.

  Where the template has already opened the reasoning, a `<think>` at the response's start is
  dropped; everything else is kept. Templates are not applied to responses: some of them strip
  the reasoning out.

  Args:
    response: a string, or a list with one message.

  Raises:
    BadExample: not one of the two, or empty.
  """
  if response is None:
    raise BadExample("null")
  if not isinstance(response, str):
    messages = _messages(response)
    if len(messages) != 1:
      raise BadExample("response of several messages")
    response = messages[0]["content"]
  if prompt.rstrip().endswith(_THINK) and response.lstrip().startswith(_THINK):
    response = response.lstrip()[len(_THINK) :]
    if prompt.endswith("\n"):
      response = response.removeprefix("\n")
  if not response.strip():
    raise BadExample("empty response")
  return response


def encode_prompt(tokenizer, prompt, chat_template: str = "") -> list[int]:
  """A prompt's ids, as in training: the one path for training and sampling.

  Raises:
    UserError: no chat template, or not a prompt.
  """
  if not tokenizer.chat_template and not chat_template:
    check_tokenizer(tokenizer)
  try:
    text = prompt_text(tokenizer, prompt, chat_template)
  except BadExample as error:
    raise UserError(f"Not a prompt: {error}; give a string or chat messages.") from error
  return encode(tokenizer, [text])[0]


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
  """Ids of texts that hold their special tokens already; in parallel where it is a fast one."""
  return tokenizer(texts, add_special_tokens=False)["input_ids"]


def with_eos(ids: list[int], eos: int) -> list[int]:
  """The ids ended by one EOS, not two."""
  return ids if ids and ids[-1] == eos else [*ids, eos]


def _messages(value) -> list[dict]:
  if value is None:
    raise BadExample("null")
  good = isinstance(value, list) and value and all(
    isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
    for m in value
  )  # fmt: skip
  if not good:
    raise BadExample("not a string or messages")
  # Parquet fills absent fields of a struct with null; templates test for presence.
  return [{k: v for k, v in m.items() if v is not None} for m in value]
