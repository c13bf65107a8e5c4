"""Whether a model has an embedding for token ids."""

import numbers
from collections.abc import Sequence

import numpy as np

from refine_jax.errors import UserError
from refine_jax.quoting import cut
from refine_jax.text.tokenizer import Tokenizer


def first_outside(ids: np.ndarray, vocab_size: int) -> int | None:
  """The index of the first id that is below 0 or not below vocab_size, or None."""
  # The extremes of a memory map need no memory, which a mask of it would.
  if not ids.size or 0 <= ids.min() <= ids.max() < vocab_size:
    return None
  return int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])


def check_ids(
  ids: Sequence[int] | np.ndarray, vocab_size: int, what: str, tokenizer: Tokenizer | None = None
) -> None:
  """Refuses token ids without an embedding, whose lookup would give NaN.

  Args:
    ids: an array of any shape or a sequence; none is fine.
    vocab_size: rows of the model's embedding.
    what: what has the ids, with which the message begins.
    tokenizer: says which token an id is.

  Raises:
    UserError: names the first such id, its token and vocab_size; or what is no integer.
  """
  if not (isinstance(ids, np.ndarray) and ids.dtype.kind in "iu"):
    odd = [i for i in np.asarray(ids, object).ravel() if not isinstance(i, numbers.Integral)]
    if odd:
      raise UserError(f"{what} has {cut(repr(odd[0]))}, which is no token id.")
  flat = np.asarray(ids).ravel()
  index = first_outside(flat, vocab_size)
  if index is None:
    return
  token_id = int(flat[index])
  raise UserError(
    f"{what} has token id {token_id}{_token(tokenizer, token_id)}, which is outside the model's"
    f" vocabulary of {vocab_size} (ids 0 to {vocab_size - 1}); use the tokenizer that belongs to"
    " the model, or resize the model's embedding."
  )


def _token(tokenizer, token_id: int) -> str:
  if tokenizer is None or not 0 <= token_id < 2**31:
    return ""
  token = tokenizer.convert_ids_to_tokens(token_id)
  return "" if token is None else f" ({cut(repr(token))})"
