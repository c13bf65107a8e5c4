"""Which options a call may give, and what stands for those that it does not."""

import numbers
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from refine_jax.decoding.drafts import KINDS
from refine_jax.decoding.settings import DRAFTS, MODES
from refine_jax.errors import UserError
from refine_jax.hf.generation_config import Refinement

_SMALLEST_BUCKET = 16

_BLOCK_SIZE = 8


# Most tokens that a pass takes in by default. Branches of N tokens come to N^2 a row, so with many
# rows blocks become smaller, and never smaller than the least.
_ROOM, _LEAST_BLOCK = 2048, 4


class Options(TypedDict, total=False):
  """The options of `generation.generate`, which says what they mean, but for `stream`."""

  mode: str
  block_size: int | None
  max_new_tokens: int
  draft: str | None
  refine_iter: int
  tau: float
  temperature: float
  top_k: int
  top_p: float
  seed: int
  first_row: int
  noise_token: int | None
  eos_token_id: int | Sequence[int] | None
  stop: Sequence[str]
  chat_template: str
  trace: bool


def default_draft(trained: Refinement | None, mode: str) -> str:
  """The default: what suits the mode, and what the model was trained for."""
  if mode == "fixed":
    return "noise"
  return "branches" if trained and trained.block_size else "tail"


def default_block_size(trained: Refinement | None, mode: str, draft: str | None, rows: int) -> int:
  """The default: that of the training; in exact, whose text it does not change, what has room."""
  if not (trained and trained.block_size):
    return _BLOCK_SIZE
  size, kind = trained.block_size, KINDS[draft or default_draft(trained, mode)]
  # Where a pass takes in more than the block.
  while mode == "exact" and size > _LEAST_BLOCK and kind.extra_tokens(size):
    if rows * (size + kind.extra_tokens(size)) <= _ROOM:
      break
    size -= 1
  return size


def check_options(
  *,
  mode: str,
  block_size: int | None,
  max_new_tokens: int,
  draft: str | None,
  refine_iter: int,
  tau: float,
  temperature: float,
  top_k: int,
  top_p: float,
  seed: int,
  stop: str | Sequence[str],
  first_row: int = 0,
) -> None:
  """What can be told of options before there is a model.

  Raises:
    UserError: names the option, its value and what it may be.
  """
  require("mode", mode, mode in MODES, f"one of {', '.join(MODES)}")
  require("draft", draft, draft in (None, *DRAFTS), f"one of {', '.join(DRAFTS)}")
  if mode == "fixed" and draft and KINDS[draft].needs_verifying:
    raise UserError(f"draft={draft!r} needs a mode that verifies, and mode='fixed' does not.")
  block_size = _BLOCK_SIZE if block_size is None else block_size
  for name, value, least in (
    ("block_size", block_size, 1),
    ("max_new_tokens", max_new_tokens, 1),
    ("refine_iter", refine_iter, 1),
    ("top_k", top_k, 0),
    ("seed", seed, 0),
    ("first_row", first_row, 0),
  ):
    good = isinstance(value, numbers.Integral) and value >= least
    require(name, value, good, f"a whole number of at least {least}")
  # Beyond these, what is allocated from them is more than a machine has.
  for name, value, most in (("block_size", block_size, 2**12), ("first_row", first_row, 2**24)):
    require(name, value, value <= most, f"at most {most}")
  require("tau", tau, tau >= 0, "a probability")
  require("temperature", temperature, 0 <= temperature < np.inf, "0 or a positive number")
  require("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
  if stop == "" or "" in tuple(stop or ()):
    raise UserError("A stop string is empty; it would end every answer at once.")


def require(name: str, value: object, good: bool, what: str) -> None:
  """Raises UserError, which names the option and says what it must be, unless it is good."""
  if not good:
    raise UserError(f"{name}={value!r} cannot be; it must be {what}.")
