"""How a call decodes: the static choices that its compiled programs are made for."""

import dataclasses

import jax

from refine_jax.decoding import drafts
from refine_jax.decoding.compile_cache import bucket

# On a GPU, products of fewer rows than this take longer, not less.
_LEAST_ROWS = 16

MODES = ("exact", "fixed", "threshold", "ar")
DRAFTS = tuple(drafts.KINDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How one call decodes.

  Values are arrays of the state (sampler.State), so that a new one compiles nothing; the rest is
  static, and `program` is what a program is compiled for.

  Attributes:
    mode: "exact"; "fixed" (refine_iter passes a block, then commit it: the document's
      algorithm); "threshold" (commit while the probability is at least tau); "ar".
    block: tokens that a pass can commit, block - 1 of them drafts ("threshold" may go on in the
      kind's extra predictions: `most`).
    draft: one of DRAFTS, whose files say what they do: "tail" keeps the last pass's predictions,
      "noise" puts the noise token, "ngram" continues as the text did after its last two tokens
      occurred before, "branches" runs over noise for every length of the verified text.
    refine_iter, tau: for "fixed" and "threshold".
    temperature: 0 for greedy. Otherwise a token is the argmax of logits / temperature plus Gumbel
      noise that depends on (seed, row, position) alone: a sample of the model's distribution that
      is a function of the tokens before it, so "exact" stays exact and equal to "ar".
    top_k, top_p: 0 and 1: off.
    random_noise: noise tokens are drawn from the vocabulary; noise_token only marks their places.
    engine: of cache_attention.
    least_window: see `least_window`.
  """

  mode: str = "exact"
  block: int = 8
  draft: str = "tail"
  refine_iter: int = 2
  tau: float = 0.9
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  noise_token: int = 0
  random_noise: bool = False
  eos_ids: tuple[int, ...] = ()
  engine: str = "xla"
  least_window: int = 1

  @property
  def program(self) -> "Settings":
    """These settings with one value in the place of all that the same program serves."""
    samples = self.temperature > 0
    return dataclasses.replace(
      self,
      refine_iter=1,
      tau=0.0,
      temperature=1.0 if samples else 0.0,
      # How many logits are sorted out; the state says how many of them stay.
      top_k=bucket(self.top_k, 1) if samples and self.top_k else 0,
      top_p=0.5 if samples and self.top_p < 1 else 1.0,
    )

  @property
  def window(self) -> int:
    """Tokens a pass runs over: modes that commit unverified tokens run over those once more."""
    needed = 2 * self.block - 1 if self.mode in ("fixed", "threshold") else self.block
    return max(needed, self.least_window)

  @property
  def kind(self) -> drafts.DraftKind:
    """Where drafts come from; a block of one token has none, whatever was asked for."""
    return drafts.KINDS[self.draft if self.block > 1 else "tail"]

  @property
  def extra_tokens(self) -> int:
    """Tokens a row that the draft kind adds to a pass."""
    return self.kind.extra_tokens(self.block)

  @property
  def tokens(self) -> int:
    """Tokens a row that a pass runs over."""
    return self.window + self.extra_tokens

  @property
  def drafts_of_prompt(self) -> int:
    """Drafts that the prompt's pass makes for the first one."""
    return 0 if self.mode == "fixed" else self.kind.prompt_drafts(self.block)

  @property
  def width(self) -> int:
    """Tokens that a pass predicts; those that it does not commit may be drafts."""
    return self.block + self.kind.extra_predictions(self.block)

  @property
  def most(self) -> int:
    """Tokens that a pass can commit."""
    return self.width if self.mode == "threshold" else self.block

  @property
  def reach(self) -> int:
    """Places of the cache after the committed tokens that a pass may write."""
    return self.tokens + (0 if self.extra_tokens else self.block)


def least_window(rows: int) -> int:
  """Tokens a row that a pass should run over at least; those that it does not need are drafts."""
  return max(_LEAST_ROWS // rows, 1) if jax.default_backend() == "gpu" else 1
