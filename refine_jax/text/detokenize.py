"""Text of answers that grow: only what can still change is decoded again.

A tokenizer's text of some tokens is not the texts of the tokens joined. Characters are split over
tokens, and the space that a text begins with is dropped. So a few tokens before the new ones are
decoded with them, and what the next tokens could still change waits.
"""

import re
from collections.abc import Sequence

from refine_jax.text.tokenizer import Tokenizer

_CONTEXT = 8  # tokens before the new ones
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
  """An answer's text: special tokens left out, every space as the model wrote it."""
  return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
  """The tokens that `decode` leaves out, by their text."""
  return {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


class GrowingText:
  """Attributes:
  settled: the beginning of the text that no further token can change.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._tokenizer = tokenizer
    self._window = []  # the last tokens: some that are settled, and all that are not
    self._known = 0  # leading characters of the window's text that `settled` ends with
    self.settled = ""

  def copy(self) -> "GrowingText":
    new = GrowingText(self._tokenizer)
    new._window, new._known, new.settled = list(self._window), self._known, self.settled
    return new

  def add(self, tokens: list[int]) -> None:
    self._window += tokens
    count = len(self._window)
    while count and self._waits(self._window[count - 1]):
      count -= 1
    text = self._text(self._window[:count])
    self._settle(text)
    context = self._window[max(count - _CONTEXT, 0) : count]
    if count > 2 * _CONTEXT:
      # Without any text before them the next tokens would lose their space.
      shorter = self._text(context)
      if shorter:
        self._window = context + self._window[count:]
        self._known = len(shorter)

  def finish(self) -> None:
    """No token comes any more: all is settled."""
    self._settle(decode(self._tokenizer, self._window))

  def _settle(self, text):
    self.settled += text[self._known :]
    self._known = len(text)

  def _text(self, tokens) -> str:
    # Half a character decodes to a replacement sign, and waits for its other half.
    return decode(self._tokenizer, tokens).rstrip("\ufffd")

  def _waits(self, token) -> bool:
    """Whether a text that ends here may change: byte tokens are read as one run, up to its end."""
    piece = self._tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # an id that the embedding has and the tokenizer has not: it has no text
      return True
    return bool(_BYTE.fullmatch(piece)) or not decode(self._tokenizer, [token])


class GrowingAnswer:
  """A row's tokens and text up to the first stop string.

  Attributes:
    tokens: the fewest whose text holds a stop string, or all.
    text: what is certain of it; a stop string and what may become one are left out.
    stopped: whether a stop string was found; further tokens then change nothing.
  """

  def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    self._text = GrowingText(tokenizer)
    self._stops = stops
    self._longest = max(map(len, stops), default=0)
    self._finished = False
    self.tokens = []
    self.stopped = False

  def extend(self, tokens: list[int], finished: bool) -> None:
    """Adds the tokens that came after `self.tokens`; `finished` if they are the last ones."""
    if self._finished:
      return
    before, known = self._text.copy(), len(self._text.settled)
    self._text.add(tokens)
    if finished:
      self._text.finish()
    if self._stop_after(self._text, known):
      tokens = self._up_to_stop(before, known, tokens)
      self.stopped = True
    self.tokens += tokens
    self._finished = finished or self.stopped

  @property
  def text(self) -> str:
    settled = self._text.settled
    if self.stopped:
      return settled[: min(settled.find(s) for s in self._stops if s in settled)]
    if self._finished:
      return settled
    size = len(settled)
    for stop in self._stops:
      begun = (n for n in range(len(stop) - 1, 0, -1) if settled.endswith(stop[:n]))
      size = min(size, len(settled) - next(begun, 0))
    return settled[:size]

  def _stop_after(self, text, known) -> bool:
    """Whether there is a stop string that ends after the first `known` characters."""
    fresh = text.settled[max(known - self._longest + 1, 0) :] if self._stops else ""
    return any(stop in fresh for stop in self._stops)

  def _up_to_stop(self, before, known, tokens) -> list[int]:
    """The fewest tokens that hold a stop string; `self._text` becomes theirs."""
    for count, token in enumerate(tokens, 1):
      before.add([token])
      if self._stop_after(before, known):
        self._text = before
        return tokens[:count]
    return tokens  # it is there only since nothing can follow
