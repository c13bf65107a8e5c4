"""Which options a row is decoded with: the one list, with defaults, meanings and checks."""

import dataclasses
import numbers
from collections.abc import Sequence

import numpy as np

from refine_jax.decoding.drafts import KINDS
from refine_jax.errors import UserError
from refine_jax.hf.generation_config import Refinement

MODES = ("exact", "fixed", "threshold", "ar")
AUTO = "auto"
DRAFTS = (*KINDS, AUTO)

_BLOCK_SIZE = 8
# Most tokens that a pass takes in by default. Branches of N tokens come to N^2 a row, so with many
# rows blocks become smaller, and never smaller than the least.
_ROOM, _LEAST_BLOCK = 2048, 4
# Tokens of all rows from which on a pass is bound by arithmetic and not by memory (an H100), and
# the most and least of a row.
_BUDGET_ROOM, _MOST_BUDGET, _LEAST_BUDGET = 512, 128, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How a row is decoded.

  mode, draft and block_size decide which program runs, and are the same for all rows of an engine.
  All else are values of a row: rows of one batch may differ in them, and none compiles anything.

  Attributes:
    mode: "exact" commits the drafts that one pass verifies, and one token more: the text of greedy
      autoregressive decoding. "fixed" commits a block after `refine_iter` passes over it (the
      document's algorithm). "threshold" commits while the probability is at least `tau`. "ar" is
      one token a pass.
    block_size: tokens that a pass can commit; 1 is autoregressive decoding. Default: what the model
      was trained with (noise.kind "block"; fewer for many rows in "exact"), else 8. Of "auto": at
      most.
    budget: tokens a row of a pass with drafts "budget" or "cycle". Default: what has room for so
      many rows; of "cycle" at most the block.
    draft: "tail" keeps the last pass's predictions, "noise" puts the noise token, "ngram" continues
      as the text did after its last two tokens occurred before, "branches" runs over noise for
      every length of the verified text, "budget" only where the drafts' probabilities make it worth
      a token, "cycle" drafts in one pass and verifies in the next, "auto" is what gives most tokens
      a second for so many rows, "ar" where nothing pays (`python -m refine_jax.tune` measures it;
      else a table for H100s counts, and few tokens a pass on other devices). Default: for "exact"
      without a block_size "auto", for "fixed" "noise", for a model trained with blocks "branches",
      else "tail".
    max_new_tokens: never overshot; EOS counts.
    refine_iter, tau: of "fixed" and "threshold".
    temperature: 0 for greedy. Otherwise a token is the argmax of logits / temperature plus Gumbel
      noise that depends on (seed, row, position) alone: a sample of the model's distribution that
      is a function of the tokens before it, so "exact" stays exact and equal to "ar".
    top_k, top_p: 0 and 1: off.
    seed: a row's sample depends on it and on the row's place among the prompts alone.
    first_row: the place of the first prompt, where the prompts come in several calls.
    noise_token: default: that of the training, or the first EOS id. With a model that was trained
      on noise of any id, an id given here stands for all of them.
    eos_token_id: any of these ends a row; default: the model's.
    stop: strings that end a row where they first appear in its text, which they stay out of;
      a special token ends it as EOS does. Looked for on the host: without a stream, after every
      8 passes, so that a row may take part in a few more than it needed.
    chat_template: for tokenizers without one.
    log_probabilities: keep that of each token of the answer, in the distribution that it was chosen
      from (of greedy rows the model's own).
    trace: keep what each pass predicted, to be shown. A pass then is a call of its own, which
      takes longer; the tokens are the same.

  Raises:
    UserError: names the option, its value and what it may be.
  """

  mode: str = "exact"
  block_size: int | None = None
  draft: str | None = None
  budget: int | None = None
  max_new_tokens: int = 256
  refine_iter: int = 2
  tau: float = 0.9
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  first_row: int = 0
  noise_token: int | None = None
  eos_token_id: int | Sequence[int] | None = None
  stop: str | Sequence[str] | None = ()
  chat_template: str = ""
  log_probabilities: bool = False
  trace: bool = False

  def __post_init__(self) -> None:
    require("mode", self.mode, self.mode in MODES, f"one of {', '.join(MODES)}")
    require("draft", self.draft, self.draft in (None, *DRAFTS), f"one of {', '.join(DRAFTS)}")
    kind = KINDS.get(self.draft or "")
    budgeted = kind is not None and kind.budgeted
    if self.mode not in ("exact", "ar") and (budgeted or self.draft == AUTO):
      raise UserError(f"draft={self.draft!r} needs mode='exact', and mode={self.mode!r} is not.")
    if self.budget is not None and not budgeted:
      names = " or ".join(name for name in KINDS if KINDS[name].budgeted)
      raise UserError(f"budget={self.budget!r} needs draft={names}, and draft is {self.draft!r}.")
    if self.log_probabilities and self.mode not in ("exact", "ar"):
      raise UserError(
        f"log_probabilities needs mode exact or ar; tokens of mode={self.mode!r} may be drafts,"
        " which the model never gave a probability."
      )
    if self.mode == "fixed" and kind and kind.needs_verifying:
      raise UserError(
        f"draft={self.draft!r} needs a mode that verifies, and mode='fixed' does not."
      )
    block_size = _BLOCK_SIZE if self.block_size is None else self.block_size
    for name, value, least in (
      ("block_size", block_size, 1),
      ("budget", 2 if self.budget is None else self.budget, 2),
      ("max_new_tokens", self.max_new_tokens, 1),
      ("refine_iter", self.refine_iter, 1),
      ("top_k", self.top_k, 0),
      ("seed", self.seed, 0),
      ("first_row", self.first_row, 0),
    ):
      good = isinstance(value, numbers.Integral) and value >= least
      require(name, value, good, f"a whole number of at least {least}")
    # Beyond these, what is allocated from them is more than a machine has.
    for name, value, most in (
      ("block_size", block_size, 2**12),
      ("budget", self.budget or 0, 2**16),
      ("first_row", self.first_row, 2**24),
    ):
      require(name, value, value <= most, f"at most {most}")
    for name, good, what in (
      ("tau", lambda x: x >= 0, "a probability"),
      ("temperature", lambda x: 0 <= x < np.inf, "0 or a positive number"),
      ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ):
      value = getattr(self, name)
      number = isinstance(value, numbers.Real) and not isinstance(value, bool)
      require(name, value, number and good(value), what)
    stop = () if self.stop is None else self.stop
    texts = isinstance(stop, str | Sequence) and all(isinstance(s, str) for s in stop)
    require("stop", stop, texts, "a string, or a list of strings")
    if "" in self.stops:
      raise UserError("A stop string is empty; it would end every answer at once.")

  @property
  def stops(self) -> tuple[str, ...]:
    """The stop strings, however they were given."""
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def chooses(options: Options) -> bool:
  """Whether drafts are those that pay for so many rows: "auto", named or by default."""
  default = options.draft is None and options.block_size is None
  return options.mode == "exact" and (options.draft == AUTO or default)


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
  if kind.budgeted:
    return size
  # Where a pass takes in more than the block.
  while mode == "exact" and size > _LEAST_BLOCK and kind.extra_tokens(size):
    if rows * (size + kind.extra_tokens(size)) <= _ROOM:
      break
    size -= 1
  return size


def default_budget(block: int, draft: str, rows: int) -> int:
  """The default of tokens a row: what has room, and of "cycle" no more than a block."""
  most = block if draft == "cycle" else _MOST_BUDGET
  return min(max(_BUDGET_ROOM // rows, _LEAST_BUDGET), most)


def require(name: str, value: object, good: bool, what: str) -> None:
  """Raises UserError, which names the option and says what it must be, unless it is good."""
  if not good:
    raise UserError(f"{name}={value!r} cannot be; it must be {what}.")
