"""The one exception for what a user can cause and mend."""

import re

# Names in damaged or hostile files can be of any length; a path of a system is at most 4,096.
_LONGEST_WORD, _LONGEST_MESSAGE = 400, 4000


class UserError(Exception):
  """A mistake in the input: its message says what is wrong, where, and what to do.

  The command-line entry points print the message as one line and exit with status 1;
  anything else keeps its traceback, because it is a fault of ours.

  A message often quotes a file that somebody else wrote. So characters that a terminal would act
  on are shown as escapes, and what is very long is cut.
  """

  def __init__(self, message: str) -> None:
    super().__init__(_one_line(message))


def _one_line(message: str) -> str:
  """The text with whitespace joined, control characters escaped, long words and ends cut."""
  text = " ".join(message.split())
  if not text.isprintable():
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  text = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", _cut_word, text)
  if len(text) > _LONGEST_MESSAGE:
    text = f"{text[: _LONGEST_MESSAGE // 2]} [..] {text[-_LONGEST_MESSAGE // 2 :]}"
  return text


def _cut_word(match: re.Match) -> str:
  word = match.group()
  return f"{word[: _LONGEST_WORD // 2]}[.. {len(word)} characters]"
