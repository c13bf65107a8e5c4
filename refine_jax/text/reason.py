"""What another library's error says, short enough to stand in a message of ours."""

LONGEST = 200


def reason(error: BaseException) -> str:
  """The error's text in one line of at most LONGEST characters; its type where it has no text.

  It may quote a file that somebody else wrote, so the length has a bound.
  """
  return cut(" ".join(str(error).split())) or type(error).__name__


def cut(text: str) -> str:
  """The text, or its beginning where it is longer than LONGEST characters."""
  return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
