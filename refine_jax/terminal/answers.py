"""Answers to standard output, in the order of their prompts, each as soon as it is there."""

import argparse
import json
import sys

from refine_jax.decoding import comparison, generation, result, trace_html, trace_svg
from refine_jax.decoding.call import Call
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import requests
from refine_jax.terminal.conversation import show
from refine_jax.terminal.prompts import NoPrompt, refused


def answer(model: Model, prompts: list, arguments: argparse.Namespace, options: dict) -> int:
  """Decodes the prompts batch by batch, and writes all that was asked for.

  Returns:
    the exit status: 1 where a prompt could not be answered.
  """
  bad = refused(model, prompts, arguments.chat_template)
  waiting = dict(bad)
  places = [i for i in range(len(prompts)) if i not in bad]
  options |= {"trace": bool(arguments.html or arguments.svg)}
  if arguments.check:
    out = _check_all(model, prompts, places, waiting, arguments, options)
  elif min(arguments.batch_size, len(places)) == 1 and not arguments.jsonl:
    parts = []
    for number, place in enumerate(places):
      _print_refused(prompts, place, waiting, arguments.jsonl)
      one = options | {"first_row": number}
      stream = generation.generate(model, [prompts[place]], stream=True, **one)
      show(stream)
      parts.append(stream.result)
      if len(prompts) > 1:
        print("---", flush=True)
    out = result.joined(parts)
  else:
    out = _decode_all(model, prompts, places, waiting, arguments, options)
  _print_refused(prompts, len(prompts), waiting, arguments.jsonl)
  print(f"[{out.numbers}]", file=sys.stderr)
  if arguments.html:
    trace_html.write(out, arguments.html)
  if arguments.svg:
    trace_svg.write(out, arguments.svg)
  if bad:
    print(f"error: {len(bad)} of {len(prompts)} prompts cannot be answered.", file=sys.stderr)
  return 1 if bad else 0


def _decode_all(model, prompts, places, waiting, arguments, options) -> result.Generation:
  """Decodes the prompts at these places together, and prints each as soon as its turn has come."""
  wanted = requests(model, [prompts[i] for i in places], Options(**options))
  call = Call(model, wanted, slots=arguments.batch_size)
  ended, printed = {}, 0
  while call.busy:
    ended |= {answer.request: answer for answer in call.step()}
    while printed < len(wanted) and wanted[printed] in ended:
      one = ended[wanted[printed]]
      shown = (one.text, one.tokens, one.passes, one.stopped)
      _print_answer(prompts, places[printed], waiting, *shown, arguments.jsonl)
      printed += 1
  return call.result()


def _check_all(model, prompts, places, waiting, arguments, options) -> result.Generation:
  """Decodes the prompts at these places twice, and says where answers part from "ar"."""
  good = [prompts[i] for i in places]
  compared = comparison.compare_with_ar(model, good, slots=arguments.batch_size, **options)
  out = compared.answers
  columns = zip(out.texts or (), out.tokens, out.passes, out.stopped, strict=True)
  for place, row, answer in zip(places, compared.rows, columns, strict=True):
    _print_answer(prompts, place, waiting, *answer, arguments.jsonl, row)
  for number, row in enumerate(compared.rows, 1):
    print(f"answer {number}: {row}", file=sys.stderr)
  return out


def _print_refused(prompts, before: int, waiting: dict[int, str], as_json: bool):
  """Prints the errors of prompts before this index, and takes them out of those that wait."""
  for i in sorted(index for index in waiting if index < before):
    prompt = prompts[i].line if isinstance(prompts[i], NoPrompt) else prompts[i]
    entry = {"prompt": prompt, "error": waiting.pop(i)}
    # ASCII, for a prompt that is no Unicode is one of the reasons.
    print(json.dumps(entry) if as_json else f"error: {entry['error']}\n---", flush=True)


def _print_answer(prompts, place, waiting, text, tokens, passes, stopped, as_json, difference=None):
  """Prints an answer; before it, the errors that wait for their place."""
  _print_refused(prompts, place, waiting, as_json)
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
