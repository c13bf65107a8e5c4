"""A conversation in the terminal, turn by turn."""

import contextlib
import sys

from refine_jax.decoding import generation
from refine_jax.decoding.loading import Model
from refine_jax.errors import UserError
from refine_jax.interrupt import Interrupt

FORGET = "/new"  # a line of a chat


def show(stream: generation.Stream, asked: Interrupt | None = None) -> str:
  """Prints the first row's pieces as they come, and returns them joined.

  Args:
    asked: an Interrupt, which ends the answer after the pass that is under way: its memory is
      that of the answer so far.
  """
  text = ""
  for (piece,) in stream:
    print(piece, end="", flush=True)
    text += piece
    if asked and asked.requested(0):
      break
  print(flush=True)
  return text


def chat(model: Model, options: dict) -> None:
  """Turns until the input ends."""
  asks = "> " if sys.stdin.isatty() else ""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  input() edits its line and knows the lines before
  messages = []
  while True:
    try:
      line = input(asks)
    except (EOFError, KeyboardInterrupt):
      return
    except UnicodeDecodeError:
      raise UserError("The input is not UTF-8.") from None
    if line.strip() == FORGET:
      messages = []
    elif line.strip():
      turn = [*messages, {"role": "user", "content": line}]
      try:
        stream = generation.generate(model, [turn], stream=True, **options)
      except UserError as error:  # as a rule the conversation has become too long
        if not asks:
          raise
        print(f"error: {error} {FORGET} starts over.", file=sys.stderr)
        continue
      except KeyboardInterrupt:
        print()
        continue
      with Interrupt() as asked:
        answer = show(stream, asked)
      print(f"[{stream.result.numbers.splitlines()[0]}]", file=sys.stderr)
      messages = [*turn, {"role": "assistant", "content": answer}]
