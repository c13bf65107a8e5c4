"""What decoding gives back: answers, their numbers, and on request every pass."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from refine_jax.decoding import trace_html
from refine_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pass:
  """What one pass made of one row's block.

  Attributes:
    start: place in the answer of the block's first token.
    tokens: predicted for start, start + 1, .., as far as the row's limit.
    probabilities: of each, in the distribution that it was chosen from.
    committed: how many of the leading ones became part of the answer.
  """

  start: int
  tokens: list[int]
  probabilities: list[float]
  committed: int


@dataclasses.dataclass(frozen=True)
class Trace:
  """Attributes:
  rows: for each prompt the passes that its row took part in.
  prompts: as text.
  pieces: the text of every token id in `rows`; its number without a tokenizer.
  """

  rows: list[list[Pass]]
  prompts: list[str]
  pieces: dict[int, str]


@dataclasses.dataclass(frozen=True)
class Generation:
  """Answers, one a prompt, and what they cost; a notebook shows it as HTML.

  Attributes:
    prompts: token ids.
    tokens: ids without the prompt; the EOS that ended an answer is its last.
    texts: the same decoded, special tokens left out; None without a tokenizer.
    passes: forward passes that each row took part in after its prompt.
    stopped: whether each row ended by EOS or a stop string, and not by its limit.
    accepted: for each offset in the block, the share of passes that committed it.
    prefill_seconds, decode_seconds: wall clock, without compilation.
    compile_seconds: 0 where the programs were there already.
    trace: where it was asked for.
    programs: how many were compiled.
    log_probabilities: of each row's tokens, where they were asked for.
    not_finite: rows that ended because the model's logits were not finite (`attempt`).
  """

  prompts: list[list[int]]
  tokens: list[list[int]]
  texts: list[str] | None
  passes: list[int]
  stopped: list[bool]
  accepted: list[float]
  prefill_seconds: float
  decode_seconds: float
  compile_seconds: float
  trace: Trace | None = dataclasses.field(default=None, repr=False)
  programs: int = 0
  log_probabilities: list[list[float]] | None = dataclasses.field(default=None, repr=False)
  not_finite: list[int] = dataclasses.field(default_factory=list)

  @property
  def tokens_per_pass(self) -> float:
    return sum(map(len, self.tokens)) / max(sum(self.passes), 1)

  @property
  def tokens_per_second(self) -> float:
    return sum(map(len, self.tokens)) / max(self.decode_seconds, 1e-9)

  @property
  def numbers(self) -> str:
    """All that was counted, in two lines."""
    shares = ", ".join(f"{share:.0%}" for share in self.accepted)
    return (
      f"{sum(map(len, self.tokens))} tokens, {self.tokens_per_pass:.2f} a pass,"
      f" {self.tokens_per_second:.0f} a second; prefill {self.prefill_seconds:.3g} s, decode"
      f" {self.decode_seconds:.3g} s, compilation of {self.programs} programs"
      f" {self.compile_seconds:.3g} s"
      f"\npasses that committed each offset of the block: {shares}"
    )

  def __str__(self) -> str:
    answers = self.texts if self.texts is not None else [str(t) for t in self.tokens]
    return "\n".join([*answers, f"[{self.numbers}]"])

  def _repr_html_(self) -> str:
    return trace_html.fragment(self)


def token_texts(tokenizer: Tokenizer | None, ids: Iterable[int]) -> dict[int, str]:
  """Each id's text, with the space that tokenizers drop at the start of a text."""
  if tokenizer is None:
    return {i: f" {i}" for i in ids}
  anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
  skipped = len(tokenizer.decode(anchor)) if anchor else 0
  return {i: tokenizer.decode([*anchor, i])[skipped:] for i in ids}


def joined(parts: list[Generation]) -> Generation:
  """One Generation of several, their answers in order and their numbers together."""
  lists: dict[str, Any] = {
    name: [entry for part in parts for entry in getattr(part, name)]
    for name in ("prompts", "tokens", "passes", "stopped")
  }
  seconds: dict[str, Any] = {
    f"{what}_seconds": sum(getattr(part, f"{what}_seconds") for part in parts)
    for what in ("prefill", "decode", "compile")
  }
  texts = [part.texts for part in parts if part.texts is not None]
  traces = [part.trace for part in parts if part.trace is not None]
  trace = None
  if len(traces) == len(parts):
    trace = Trace(
      [row for t in traces for row in t.rows],
      [prompt for t in traces for prompt in t.prompts],
      {token: piece for t in traces for token, piece in t.pieces.items()},
    )
  sure = [part.log_probabilities for part in parts if part.log_probabilities is not None]
  passes = max(sum(lists["passes"]), 1)
  accepted = [
    sum(share * sum(part.passes) for share, part in zip(shares, parts, strict=True)) / passes
    # A part with smaller blocks committed nothing at the offsets that only others have.
    for shares in itertools.zip_longest(*(part.accepted for part in parts), fillvalue=0.0)
  ]
  return Generation(
    texts=[text for some in texts for text in some] if len(texts) == len(parts) else None,
    accepted=accepted,
    trace=trace,
    log_probabilities=[row for rows in sure for row in rows] if len(sure) == len(parts) else None,
    programs=sum(part.programs for part in parts),
    **lists,
    **seconds,
  )
