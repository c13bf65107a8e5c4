"""What users call: `generate` and `stream` for texts or ids, `iterative_generate` for arrays."""

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
from jax.typing import ArrayLike

from refine_jax.decoding.call import Call
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options, require
from refine_jax.decoding.requests import requests
from refine_jax.decoding.result import Generation
from refine_jax.errors import UserError
from refine_jax.quoting import shown

# Why a row of `attempt` is not answered.
NOT_FINITE = "the model's logits are not finite (NaN or infinite); dtype float32 may help"


def _with_options(function: Callable) -> Callable:
  """Shows every field of Options in a function's signature, where help and editors look."""
  signature = inspect.signature(function)
  named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
  fields = [
    inspect.Parameter(
      field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
    )
    for field in dataclasses.fields(Options)
  ]
  setattr(function, "__signature__", signature.replace(parameters=named + fields))  # noqa: B010
  return function


@overload
def generate(
  model: Model,
  prompts: Sequence,
  *,
  slots: int = 0,
  stream: Literal[False] = False,
  **options: Any,
) -> Generation: ...


@overload
def generate(
  model: Model,
  prompts: Sequence,
  *,
  slots: int = 0,
  stream: Literal[True] | int,
  **options: Any,
) -> "Stream": ...


@_with_options
def generate(
  model: Model, prompts: Sequence, *, slots: int = 0, stream: bool | int = False, **options: Any
) -> "Generation | Stream":
  """Decodes answers to prompts, a block of tokens a pass.

  Args:
    prompts: strings or chats (lists of {"role", "content"}), through the chat template; or lists
      of token ids, as they are.
    slots: how many rows decode at a time; the others wait for one that ends. Default: as many as
      there are prompts, at most 64, and fewer where memory is short.
    stream: what `stream` does: True for a piece after every pass, or after how many.
    options: the fields of options.Options, which says what they mean.

  Returns:
    a Generation; with `stream` a Stream, which is iterated over.

  Raises:
    UserError: an option that cannot be, an empty or too long prompt, text without a tokenizer,
      memory that the device does not have.
  """
  good = isinstance(stream, numbers.Integral) and stream >= 0
  require("stream", stream, good, "True, or how many passes make a piece")
  good = isinstance(slots, numbers.Integral) and slots >= 0
  require("slots", slots, good, "a whole number, 0 for the default")
  if stream:
    model.require_tokenizer()
  wanted = requests(model, _listed(prompts), Options(**options), follow=bool(stream))
  call = Call(model, wanted, slots=int(slots))
  if stream:
    return Stream(call, int(stream))
  while call.busy:
    call.step()
  return call.result()


@_with_options
def stream(model: Model, prompts: Sequence, *, passes: int = 1, **options: Any) -> "Stream":
  """Decodes as `generate` does, and gives the text as it is committed.

  Args:
    passes: how many passes make a piece.
    options: those of `generate`.

  Returns:
    an iterator over lists with every prompt's newly committed text.

  Raises:
    UserError: as in `generate`; a model without a tokenizer.
  """
  good = isinstance(passes, numbers.Integral) and passes >= 1
  require("passes", passes, good, "a whole number of at least 1")
  return generate(model, prompts, stream=int(passes), **options)


def attempt(model: Model, prompts: Sequence, *, slots: int = 0, **options: Any) -> Generation:
  """Decodes as `generate` does, but one row whose logits are not finite does not end the others.

  Generation.not_finite has those rows; their texts end where the logits did.

  Raises:
    UserError: as in `generate`; logits are not finite in every row.
  """
  call = Call(model, requests(model, prompts, Options(**options)), slots=slots, strict=False)
  while call.busy:
    call.step()
  return call.result()


def _listed(prompts) -> list:
  if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
    raise UserError(f"prompts is {shown(prompts)}; give a list of prompts.")
  return list(prompts)


class Stream:
  """Answers on their way: an iterator over lists with every prompt's newly committed text.

  Joined, a row's pieces are its text.
  """

  def __init__(self, call: Call, passes: int) -> None:
    self._call = call
    self._pieces = self._run(passes)

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> list[str]:
    return next(self._pieces)

  @property
  def result(self) -> Generation:
    """The answers as far as they are, and their numbers."""
    return self._call.result()

  def _run(self, passes) -> Iterator[list[str]]:
    shown = [0] * len(self._call.requests)
    while self._call.busy:
      self._call.step(passes)
      texts = self._call.texts()
      yield [text[count:] for text, count in zip(texts, shown, strict=True)]
      shown = [len(text) for text in texts]


def iterative_generate(
  model: Model,
  input_ids: ArrayLike,
  eos_token_id: int | None = None,
  pad_token_id: int | None = None,
  max_new_tokens: int = 512,
  add_eos_length: int = 127,
  refine_iter: int = 2,
) -> np.ndarray:
  """The method's first sampler: append add_eos_length EOS, refine, commit the block, go on.

  Args:
    input_ids: int [B, T], every row a whole prompt of T tokens.
    pad_token_id: fills up rows that ended; default: the model's, or EOS.
    refine_iter: passes over each block (fewer where a pass changes nothing).

  Returns:
    numpy int32 [B, T + new], prompt included; new is that of the longest answer.
  """
  prompts = np.asarray(input_ids)
  if prompts.ndim != 2:
    raise UserError(f"input_ids must be [B, T], not of shape {prompts.shape}.")
  eos = list(model.eos_token_ids) if eos_token_id is None else [eos_token_id]
  if pad_token_id is None:
    pad_token_id = model.pad_token_id if model.pad_token_id is not None else (eos or [0])[0]
  out = generate(
    model,
    prompts.tolist(),
    mode="fixed",
    block_size=add_eos_length + 1,
    max_new_tokens=max_new_tokens,
    refine_iter=refine_iter,
    eos_token_id=eos,
  )
  width = max(map(len, out.tokens), default=0)
  result = np.full((len(prompts), prompts.shape[1] + width), pad_token_id, np.int32)
  result[:, : prompts.shape[1]] = prompts
  for row, tokens in zip(result, out.tokens, strict=True):
    row[prompts.shape[1] : prompts.shape[1] + len(tokens)] = tokens
  return result
