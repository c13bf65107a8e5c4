"""Whether block decoding gave the text of autoregressive decoding, and how near it was if not."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.decoding import programs
from refine_jax.decoding.generation import generate
from refine_jax.decoding.loading import Model, hidden_states
from refine_jax.decoding.result import Generation
from refine_jax.errors import UserError
from refine_jax.model import transformer

_SMALLEST_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Difference:
  """Where one row's two answers part.

  Attributes:
    offset: the first differing place of the answer; None where the answers are equal, and then
      so are the others.
    token, ar_token: what stands there; None where an answer had ended.
    margin: between the two best logits there, by a forward pass over what the answers share.
      Rounding can only swap tokens whose logits are within its reach.
  """

  offset: int | None = None
  token: int | None = None
  ar_token: int | None = None
  margin: float | None = None

  def __str__(self) -> str:
    if self.offset is None:
      return "equal to ar"
    return (
      f"differs from ar at token {self.offset}, {self.token} for {self.ar_token}, where the two"
      f" best logits are {self.margin:.4g} apart"
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Attributes:
  rows: one a prompt.
  answers: of the mode that was compared.
  ar: of autoregressive decoding.
  """

  rows: list[Difference]
  answers: Generation
  ar: Generation

  @property
  def equal(self) -> bool:
    return all(row.offset is None for row in self.rows)

  def __str__(self) -> str:
    return "\n".join(f"answer {i}: {row}" for i, row in enumerate(self.rows, 1))


def compare_with_ar(
  model: Model, prompts: Sequence, *, strict: bool = False, trace: bool = False, **options: Any
) -> Comparison:
  """Decodes prompts in blocks and one token a pass, and says where the answers part.

  `exact` commits what the model itself would say next, but a block's logits are sums in another
  order than a single token's: in float32 the answers are equal but for near ties, in bfloat16
  they part where two logits are near.

  Args:
    strict: a difference is an error.
    trace: of the answers, as in `generate`.
    options: of `generate`; mode is "exact" where not given.

  Raises:
    UserError: as in `generate`; a temperature; with `strict`, answers that differ.
  """
  if options.get("temperature"):
    raise UserError("Answers are compared without a temperature; set it to 0.")
  if options.get("stream"):
    raise UserError("Answers cannot be compared as a stream; leave stream out.")
  mode = options.get("mode", "exact")
  answers = generate(model, prompts, trace=trace, **options)
  options["mode"] = "ar"
  ar = generate(model, answers.prompts, **options)
  rows = [
    _difference(model, prompt, tokens, ar_tokens)
    for prompt, tokens, ar_tokens in zip(answers.prompts, answers.tokens, ar.tokens, strict=True)
  ]
  comparison = Comparison(rows, answers, ar)
  if strict and not comparison.equal:
    row = next(i for i, row in enumerate(rows) if row.offset is not None)
    advice = (
      "in float32 only near ties may differ (load the model with dtype=float32)"
      if mode in ("exact", "ar")
      else f"mode={mode!r} commits what nothing has verified; 'exact' gives the text of 'ar'"
    )
    raise UserError(f"Answer {row + 1} {rows[row]}; {advice}.")
  return comparison


def _difference(model, prompt, tokens, ar_tokens) -> Difference:
  if tokens == ar_tokens:
    return Difference()
  shared = min(len(tokens), len(ar_tokens))
  pairs = zip(tokens, ar_tokens, strict=False)
  offset = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
  text = [*prompt, *tokens[:offset]]
  ids = np.zeros((1, programs.bucket(len(text), _SMALLEST_BUCKET)), np.int32)
  ids[0, : len(text)] = text  # a causal model: what follows does not reach the last token
  logits = np.asarray(_logits_at(model.params, ids, len(text) - 1, model.config))
  if not np.isfinite(logits).all():
    raise UserError(
      f"The model's logits are not finite after {len(text)} tokens; load the model with"
      " dtype=float32 or bfloat16."
    )
  second, best = np.sort(logits)[-2:]
  return Difference(
    offset,
    tokens[offset] if offset < len(tokens) else None,
    ar_tokens[offset] if offset < len(ar_tokens) else None,
    float(best - second),
  )


@functools.partial(jax.jit, static_argnames="config")
def _logits_at(params, ids_1T, index, config):
  """The next token's logits [V] after the token at `index`."""
  x_1TD = hidden_states(params, config, ids_1T, jnp.ones_like(ids_1T))
  return transformer.logits(params, x_1TD[0, index])
