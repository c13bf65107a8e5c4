"""What users call: `generate` and `stream` for texts or ids, `iterative_generate` for arrays."""

import inspect
import numbers
from collections.abc import Iterator, Sequence
from typing import Literal, Unpack, overload

import numpy as np
from jax.typing import ArrayLike

from refine_jax.decoding.decoder import Decoder
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options, check_options, require
from refine_jax.decoding.result import Generation
from refine_jax.errors import UserError

_PASSES_BETWEEN_STOPS = 8


@overload
def generate(
  model: Model,
  prompts: Sequence,
  *,
  stream: Literal[False] = False,
  **options: Unpack[Options],
) -> Generation: ...


@overload
def generate(
  model: Model, prompts: Sequence, *, stream: Literal[True] | int, **options: Unpack[Options]
) -> "Stream": ...


def generate(
  model: Model,
  prompts: Sequence,
  *,
  mode: str = "exact",
  block_size: int | None = None,
  max_new_tokens: int = 256,
  draft: str | None = None,
  refine_iter: int = 2,
  tau: float = 0.9,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  first_row: int = 0,
  noise_token: int | None = None,
  eos_token_id: int | Sequence[int] | None = None,
  stop: Sequence[str] = (),
  chat_template: str = "",
  trace: bool = False,
  stream: bool | int = False,
) -> "Generation | Stream":
  """Decodes answers to prompts, a block of tokens a pass.

  Args:
    prompts: strings or chats (lists of {"role", "content"}), through the chat template; or lists
      of token ids, as they are.
    mode: one of MODES of sampler_settings, whose Settings say what they and the next keys do.
    block_size: tokens that a pass can commit; 1 is autoregressive decoding. Default: what the model
      was trained with (noise.kind "block"; fewer for many rows in "exact"), else 8.
    max_new_tokens: for each row, never overshot; EOS counts.
    draft: one of its DRAFTS; default: for "fixed" "noise", for a model trained with blocks
      "branches", else "tail".
    seed: a row's sample depends on it and on the row's place among the prompts alone.
    first_row: the place of the first prompt, where the prompts come in several calls.
    noise_token: default: that of the training, or the first EOS id. With a model that was trained
      on noise of any id, an id given here stands for all of them.
    eos_token_id: any of these ends a row; default: the model's.
    stop: strings that end a row where they first appear in its text, which they stay out of;
      a special token ends it as EOS does. Looked for on the host: without a stream, after every
      8 passes, so that a row may take part in a few more than it needed.
    chat_template: for tokenizers without one.
    trace: keep what each pass predicted, to be shown. A pass then is a call of its own, which
      takes longer; the tokens are the same.
    stream: what `stream` does: True for a piece after every pass, or after how many.

  Returns:
    a Generation; with `stream` a Stream, which is iterated over.

  Raises:
    UserError: an option that cannot be, an empty or too long prompt, text without a tokenizer.
  """
  good = isinstance(stream, numbers.Integral) and stream >= 0
  require("stream", stream, good, "True, or how many passes make a piece")
  if stream:
    model.require_tokenizer()
  decoder = Decoder(
    model,
    prompts,
    mode=mode,
    block_size=block_size,
    max_new_tokens=max_new_tokens,
    draft=draft,
    refine_iter=refine_iter,
    tau=tau,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    seed=seed,
    first_row=first_row,
    noise_token=noise_token,
    eos_token_id=eos_token_id,
    stop=stop,
    chat_template=chat_template,
    trace=trace,
    follow=bool(stream),
  )
  if stream:
    return Stream(decoder, int(stream))
  chunk = _PASSES_BETWEEN_STOPS if stop else np.iinfo(np.int32).max
  while not decoder.step(chunk):
    pass
  return decoder.result()


def stream(
  model: Model, prompts: Sequence, *, passes: int = 1, **options: Unpack[Options]
) -> "Stream":
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


# Of the options that `options.check_options` can check before there is a model.
DEFAULTS = {
  name: inspect.signature(generate).parameters[name].default
  for name in inspect.signature(check_options).parameters
}


class Stream:
  """Answers on their way: an iterator over lists with every prompt's newly committed text.

  Joined, a row's pieces are its text.
  """

  def __init__(self, decoder: Decoder, passes: int) -> None:
    self._decoder = decoder
    self._pieces = self._run(passes)

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> list[str]:
    return next(self._pieces)

  @property
  def result(self) -> Generation:
    """The answers as far as they are, and their numbers."""
    return self._decoder.result()

  def _run(self, passes) -> Iterator[list[str]]:
    answers = self._decoder.answers or []
    shown = [0] * len(answers)
    finished = False
    while not finished:
      finished = self._decoder.step(passes)
      texts = [answer.text for answer in answers]
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
