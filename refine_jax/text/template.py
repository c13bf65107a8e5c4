"""Chat templates rendered. A template is a program that came with a model: it gets a time."""

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jinja2

from refine_jax.errors import UserError
from refine_jax.quoting import reason
from refine_jax.text.tokenizer import Tokenizer

# Conversations of a thousand turns take milliseconds, and four million tokens fit no model.
SECONDS = 10.0
LONGEST = 1 << 24


class Refused(UserError):
  """What a template says of a conversation that it does not take."""

  def __init__(self, why: str) -> None:
    super().__init__(f"refused by the chat template: {why}")


class _OutOfTime(BaseException):
  """Not an Exception: Jinja's optimiser ignores those."""


def render(
  tokenizer: Tokenizer,
  messages: list[dict],
  fallback_template: str = "",
  *,
  add_generation_prompt: bool = True,
  **options: Any,
) -> str:
  """The conversation as the tokenizer's chat template writes it, sandboxed as in transformers.

  Args:
    fallback_template: used where the tokenizer has no template.
    add_generation_prompt: ends where the assistant's answer begins.
    options: further ones of transformers' apply_chat_template.

  Raises:
    Refused: the template fails on this conversation, or gives more than LONGEST characters.
    UserError: the template runs for more than SECONDS.
  """
  template = None if tokenizer.chat_template else fallback_template
  try:
    with _deadline(SECONDS):
      text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=template,
        **options,
      )
  except _OutOfTime:
    raise UserError(
      f"{whose(tokenizer)} runs for more than {SECONDS:.0f} seconds; it may have no end. Correct"
      " it, or use another tokenizer."
    ) from None
  except Exception as error:  # a template can raise whatever Python can
    raise Refused(reason(error)) from error
  if not isinstance(text, str) or len(text) > LONGEST:
    raise Refused(f"more than {LONGEST} characters")
  return text


def check(tokenizer: Tokenizer, fallback_template: str = "") -> None:
  """Raises UserError where there is no template, or it cannot be used for any conversation."""
  if not tokenizer.chat_template and not fallback_template:
    raise UserError(
      f"The tokenizer {name(tokenizer)} has no chat template; set config.data.chat_template to one"
      " (a Jinja string)."
    )
  try:
    render(tokenizer, [{"role": "user", "content": "a"}], fallback_template)
  except Refused as error:
    # Of other errors it may take the conversations of the data.
    if isinstance(error.__cause__, (jinja2.TemplateSyntaxError, ValueError)):
      raise UserError(f"{whose(tokenizer)} cannot be used: {error}") from error


def prints_the_date(template: str | dict | None) -> bool:
  """Whether what a template gives may depend on the day.

  Args:
    template: its text, or several by name, or None.
  """
  return "strftime_now" in str(template)


def whose(tokenizer: Tokenizer) -> str:
  """The template, as messages call it."""
  if tokenizer.chat_template:
    return f"The chat template of {name(tokenizer)}"
  return "config.data.chat_template"


def name(tokenizer: Tokenizer) -> str:
  """The tokenizer, as messages call it."""
  return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _deadline(seconds: float):
  """A context that _OutOfTime ends after so many seconds."""
  main = threading.current_thread() is threading.main_thread()
  # A signal also ends long arithmetic, which other threads cannot be called out of.
  return _alarm(seconds) if main and hasattr(signal, "SIGALRM") else _watched(seconds)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
  def expire(*_):
    raise _OutOfTime

  start, before = time.monotonic(), signal.signal(signal.SIGALRM, expire)
  try:
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
      yield
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
  finally:
    signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
  if left:  # somebody else's alarm
    left = max(left - (time.monotonic() - start), 1e-3)
    signal.setitimer(signal.ITIMER_REAL, left, interval)


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[None]:
  thread, lock, over = threading.get_ident(), threading.Lock(), False

  def throw(exception):
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)

  def expire():
    with lock:
      if not over:
        throw(ctypes.py_object(_OutOfTime))

  timer = threading.Timer(seconds, expire)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    with lock:
      over = True
    timer.cancel()
    throw(None)  # one that is on its way would come after the end
