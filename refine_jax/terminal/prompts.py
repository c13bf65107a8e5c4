"""Prompts as lines of text or JSON, and what is wrong with them."""

import argparse
import codecs
import json
import sys
from typing import NamedTuple

from refine_jax.decoding.loading import Model
from refine_jax.decoding.prompts import refusals
from refine_jax.errors import UserError
from refine_jax.files import local_path


class NoPrompt(NamedTuple):
  """A line of the input that is no prompt, and why."""

  line: str
  reason: str


def read_prompts(arguments: argparse.Namespace) -> list:
  """From --prompt, --prompts_file or standard input: a line each, JSON ({"prompt": ..}) or text."""
  if arguments.prompt is not None:
    return [arguments.prompt]
  if arguments.prompts_file:
    path = local_path(arguments.prompts_file, "--prompts_file")
    if not path.is_file():
      raise UserError(f"{path} (--prompts_file) is not a file.")
    try:
      data = path.read_bytes()
    except OSError as error:
      raise UserError(f"{path} (--prompts_file) cannot be read: {error.strerror}.") from error
  elif not sys.stdin.isatty():
    data = sys.stdin.buffer.read()
  else:
    raise UserError("No prompt: give --prompt, --prompts_file, --chat, or lines on standard input.")
  if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise UserError("The prompts are not UTF-8 but UTF-16; save them as UTF-8.")
  # A line that is not UTF-8 is refused as a prompt, like any other that is no text, and ends no
  # batch. Not splitlines, which also splits at characters that JSON strings may hold.
  lines = data.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").split("\n")
  prompts = [_parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]
  if not prompts:
    raise UserError("There is no prompt in the input.")
  return prompts


def _parse(line, number):
  if not line.lstrip().startswith("{"):
    return line
  try:
    prompt = json.loads(line)["prompt"]
  except (ValueError, KeyError, RecursionError):
    prompt = None
  if not isinstance(prompt, str | list):
    return NoPrompt(line, f'Line {number} of the prompts is not {{"prompt": ...}}.')
  return prompt


def check_template(model: Model, prompts: list, arguments: argparse.Namespace) -> None:
  """Raises UserError where text has no chat template, or would have two."""
  own = model.require_tokenizer().chat_template
  if own and arguments.chat_template:
    raise UserError(
      f"{arguments.model} has a chat template, which its training used; leave --chat_template out."
    )
  # Prompts of token ids need none.
  text = arguments.chat or any(isinstance(p, str) or isinstance(p[0], dict) for p in prompts if p)
  if text and not own and not arguments.chat_template:
    raise UserError(
      f"{arguments.model} has no chat template, as a base model; give one with --chat_template, a"
      ' Jinja string such as "{{ messages[0].content }}", or give prompts as token ids.'
    )


def refused(model: Model, prompts: list, chat_template: str) -> dict[int, str]:
  """Index -> why a prompt cannot be answered.

  Raises:
    UserError: none can.
  """
  bad = {i: p.reason for i, p in enumerate(prompts) if isinstance(p, NoPrompt)}
  bad = (
    refusals(
      model,
      ["" if i in bad else p for i, p in enumerate(prompts)],
      chat_template,
      name="Prompt {}",
    )
    | bad
  )
  if len(bad) == len(prompts):
    raise UserError(bad[0])
  return bad
