"""Answers prompts in the terminal, committed text as it comes.

    python scripts/sample.py --model=DIR --prompt="What is 2+2?" [--mode=exact] [--block_size=8]
    python scripts/sample.py --model=DIR --prompts_file=prompts.txt --jsonl > answers.jsonl
    python scripts/sample.py --model=DIR --chat
    python scripts/sample.py --model=DIR --prompt="What is 2+2?" --html=passes.html

Prompts are lines, of a file or of standard input: text, or JSON {"prompt": ..} with a string, chat
messages or token ids. Answers go to standard output in their order, each as soon as it is there;
one prompt at a time streams. Numbers go to standard error. --html writes how the answers came to
be, pass by pass, to be opened in a browser. --check decodes once more, one token a pass, and says
where answers part. A prompt that cannot be answered has an error in its place, and the exit status
is 1 at the end.
"""

import argparse
import codecs
import contextlib
import json
import sys
from typing import NamedTuple

from refine_jax.cli import entry_point
from refine_jax.decoding import comparison, generation, loading, result, trace_html
from refine_jax.decoding.call import Call
from refine_jax.decoding.options import DRAFTS, MODES, Options
from refine_jax.decoding.prompts import refusals
from refine_jax.decoding.requests import requests
from refine_jax.errors import UserError
from refine_jax.files import local_path
from refine_jax.hf import export as hf_export
from refine_jax.interrupt import Interrupt

_FORGET = "/new"  # a line of a chat


class NoPrompt(NamedTuple):
  """A line of the input that is no prompt, and why."""

  line: str
  reason: str


def parse() -> tuple[argparse.Namespace, dict]:
  """The arguments, and those of them that are options of `generate`."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--model", required=True, help="Hugging Face directory, hub name or workdir")
  add("--step", type=int, help="of a workdir; default: its newest checkpoint")
  add("--dtype", help=f"{', '.join(hf_export.DTYPES)}; default: as stored")
  add("--prompt", help="one prompt")
  add("--prompts_file", help="a prompt a line, text or JSON; default: standard input")
  add("--chat_template", default="", help="a Jinja template, for a model that has none")
  add("--batch_size", type=int, default=8, help="prompts decoded at a time (8)")
  add("--chat", action="store_true", help=f"turns; {_FORGET} starts over, Ctrl-C cuts an answer")
  add("--jsonl", action="store_true", help="write a JSON object an answer")
  add("--html", help="a new file for the passes, coloured")
  add("--check", action="store_true", help="compare with one token a pass")
  group = parser.add_argument_group("decoding", "the same for all prompts")
  add = group.add_argument
  names = [
    add("--mode", default="exact", help=f"{', '.join(MODES)} (exact)"),
    add("--block_size", type=int, help="tokens that a pass can commit (chosen; as trained, or 8)"),
    add("--max_new_tokens", type=int, default=256, help="an answer, EOS counted (256)"),
    add("--draft", help=f"{', '.join(DRAFTS)} (auto; with --block_size by training)"),
    add("--budget", type=int, help="tokens a row of a pass, drafts budget and cycle (by slots)"),
    add("--refine_iter", type=int, default=2, help="passes a block, mode fixed (2)"),
    add("--tau", type=float, default=0.9, help="probability, mode threshold (0.9)"),
    add("--temperature", type=float, default=0.0, help="0 is greedy (0)"),
    add("--top_k", type=int, default=0, help="sample from so many best tokens; 0: all (0)"),
    add("--top_p", type=float, default=1.0, help="sample from so much probability (1)"),
    add("--seed", type=int, default=0, help="samples depend on it and a prompt's place (0)"),
    add("--stop", action="append", default=[], help="a string that ends an answer; repeatable"),
  ]
  arguments = parser.parse_args()
  return arguments, {action.dest: getattr(arguments, action.dest) for action in names}


def check(arguments, options):
  """Raises UserError for what would fail after the model is loaded."""
  Options(**options)
  given = [
    n
    for n in ("prompt", "prompts_file", "jsonl", "html", "check")
    if getattr(arguments, n) not in (None, False)
  ]
  if arguments.chat and given:
    raise UserError(f"--{given[0]} goes with prompts, not with --chat.")
  if given[:2] == ["prompt", "prompts_file"]:
    raise UserError("Give --prompt or --prompts_file, not both.")
  if arguments.batch_size < 1:
    raise UserError(f"--batch_size={arguments.batch_size} must be at least 1.")
  if arguments.dtype not in (None, *hf_export.DTYPES):
    raise UserError(f"--dtype={arguments.dtype} must be one of {', '.join(hf_export.DTYPES)}.")
  if arguments.check and arguments.temperature:
    raise UserError("--check compares greedy answers; leave --temperature out.")
  if arguments.html:
    arguments.html = local_path(arguments.html, "--html")
    trace_html.refuse_existing(arguments.html)


def read_prompts(arguments) -> list:
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


def check_template(model, prompts, arguments):
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


def show(stream, asked=None) -> str:
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


def chat(model, options):
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
    if line.strip() == _FORGET:
      messages = []
    elif line.strip():
      turn = [*messages, {"role": "user", "content": line}]
      try:
        stream = generation.generate(model, [turn], stream=True, **options)
      except UserError as error:  # as a rule the conversation has become too long
        if not asks:
          raise
        print(f"error: {error} {_FORGET} starts over.", file=sys.stderr)
        continue
      except KeyboardInterrupt:
        print()
        continue
      with Interrupt() as asked:
        answer = show(stream, asked)
      print(f"[{stream.result.numbers.splitlines()[0]}]", file=sys.stderr)
      messages = [*turn, {"role": "assistant", "content": answer}]


def refused(model, prompts, chat_template: str) -> dict[int, str]:
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


def answer(model, prompts, arguments, options) -> int:
  """Decodes the prompts batch by batch, and writes all that was asked for.

  Returns:
    the exit status: 1 where a prompt could not be answered.
  """
  bad = refused(model, prompts, arguments.chat_template)
  waiting = dict(bad)
  places = [i for i in range(len(prompts)) if i not in bad]
  options |= {"trace": bool(arguments.html)}
  if arguments.check:
    out = check_all(model, prompts, places, waiting, arguments, options)
  elif min(arguments.batch_size, len(places)) == 1 and not arguments.jsonl:
    parts = []
    for number, place in enumerate(places):
      print_refused(prompts, place, waiting, arguments.jsonl)
      one = options | {"first_row": number}
      stream = generation.generate(model, [prompts[place]], stream=True, **one)
      show(stream)
      parts.append(stream.result)
      if len(prompts) > 1:
        print("---", flush=True)
    out = result.joined(parts)
  else:
    out = decode_all(model, prompts, places, waiting, arguments, options)
  print_refused(prompts, len(prompts), waiting, arguments.jsonl)
  print(f"[{out.numbers}]", file=sys.stderr)
  if arguments.html:
    trace_html.write(out, arguments.html)
  if bad:
    print(f"error: {len(bad)} of {len(prompts)} prompts cannot be answered.", file=sys.stderr)
  return 1 if bad else 0


def decode_all(model, prompts, places, waiting, arguments, options) -> result.Generation:
  """Decodes the prompts at these places together, and prints each as soon as its turn has come."""
  wanted = requests(model, [prompts[i] for i in places], Options(**options))
  call = Call(model, wanted, slots=arguments.batch_size)
  ended, printed = {}, 0
  while call.busy:
    ended |= {answer.request: answer for answer in call.step()}
    while printed < len(wanted) and wanted[printed] in ended:
      one = ended[wanted[printed]]
      shown = (one.text, one.tokens, one.passes, one.stopped)
      print_answer(prompts, places[printed], waiting, *shown, arguments.jsonl)
      printed += 1
  return call.result()


def check_all(model, prompts, places, waiting, arguments, options) -> result.Generation:
  """Decodes the prompts at these places twice, and says where answers part from "ar"."""
  good = [prompts[i] for i in places]
  compared = comparison.compare_with_ar(model, good, slots=arguments.batch_size, **options)
  out = compared.answers
  columns = zip(places, out.texts, out.tokens, out.passes, out.stopped, compared.rows, strict=True)
  for place, *answer, row in columns:
    print_answer(prompts, place, waiting, *answer, arguments.jsonl, row)
  for number, row in enumerate(compared.rows, 1):
    print(f"answer {number}: {row}", file=sys.stderr)
  return out


def print_refused(prompts, before: int, waiting: dict[int, str], as_json: bool):
  """Prints the errors of prompts before this index, and takes them out of those that wait."""
  for i in sorted(index for index in waiting if index < before):
    prompt = prompts[i].line if isinstance(prompts[i], NoPrompt) else prompts[i]
    entry = {"prompt": prompt, "error": waiting.pop(i)}
    # ASCII, for a prompt that is no Unicode is one of the reasons.
    print(json.dumps(entry) if as_json else f"error: {entry['error']}\n---", flush=True)


def print_answer(prompts, place, waiting, text, tokens, passes, stopped, as_json, difference=None):
  """Prints an answer; before it, the errors that wait for their place."""
  print_refused(prompts, place, waiting, as_json)
  line = {
    "prompt": prompts[place],
    "text": text,
    "tokens": len(tokens),
    "passes": passes,
    "stopped": stopped,
  }
  if difference:
    line |= {"differs_from_ar_at": difference.offset, "margin": difference.margin}
  # Flushed, so that a reader sees each answer, and one that has left is noticed here.
  print(_as_json(line) if as_json else f"{line['text']}\n---", flush=True)


def _as_json(value: dict) -> str:
  """One line of UTF-8, with escapes where a message's field holds what is no text."""
  text = json.dumps(value, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:
    return json.dumps(value)
  return text


@entry_point
def main():
  arguments, options = parse()
  check(arguments, options)
  prompts = [] if arguments.chat else read_prompts(arguments)
  model = loading.load(arguments.model, dtype=arguments.dtype, step=arguments.step)
  check_template(model, prompts, arguments)
  options["chat_template"] = arguments.chat_template
  return chat(model, options) if arguments.chat else answer(model, prompts, arguments, options)


if __name__ == "__main__":
  main()
