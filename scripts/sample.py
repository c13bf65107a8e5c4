"""Answers prompts in the terminal, committed text as it comes.

    python scripts/sample.py --model=DIR --prompt="What is 2+2?" [--mode=exact] [--block_size=8]
    python scripts/sample.py --model=DIR --prompts_file=prompts.txt --jsonl > answers.jsonl
    python scripts/sample.py --model=DIR --chat
    python scripts/sample.py --model=DIR --prompt="What is 2+2?" --html=passes.html

--html writes how the answers came to be, pass by pass, to be opened in a browser. --check decodes
once more, one token a pass, and says on standard error where the answers part.
"""

import argparse
import json
import sys
from pathlib import Path

from refine_jax import comparison, generation, loading, refinement_html, sampler
from refine_jax.cli import entry_point
from refine_jax.errors import UserError


def read_prompts(arguments) -> list:
  """From --prompt, --prompts_file or standard input: a line each, JSON ({"prompt": ..}) or text."""
  if arguments.prompt is not None:
    return [arguments.prompt]
  if arguments.prompts_file:
    path = Path(arguments.prompts_file)
    if not path.is_file():
      raise UserError(f"{path} (--prompts_file) is not a file.")
    lines = path.read_text(encoding="utf-8").splitlines()
  elif not sys.stdin.isatty():
    lines = sys.stdin.read().splitlines()
  else:
    raise UserError("No prompt: give --prompt, --prompts_file, --chat, or lines on standard input.")
  prompts = [_parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]
  if not prompts:
    raise UserError("There is no prompt in the input.")
  return prompts


def _parse(line, number):
  if not line.lstrip().startswith("{"):
    return line
  try:
    return json.loads(line)["prompt"]
  except (ValueError, KeyError):
    raise UserError(f'Line {number} of the prompts is not {{"prompt": ...}}.') from None


def show(pieces) -> str:
  """Prints the first row's pieces as they come, and returns them joined."""
  text = ""
  for (piece,) in pieces:
    print(piece, end="", flush=True)
    text += piece
  print()
  return text


def chat(model, options):
  """Turns until the input ends."""
  messages = []
  while True:
    try:
      line = input("> ")
    except EOFError:
      return
    if line.strip():
      messages.append({"role": "user", "content": line})
      answer = show(generation.generate(model, [messages], stream=True, **options))
      messages.append({"role": "assistant", "content": answer})


@entry_point
def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True, help="Hugging Face directory, hub name or workdir")
  parser.add_argument("--step", type=int, help="of a workdir; default: its newest checkpoint")
  parser.add_argument("--dtype", help="of the parameters; default: as stored")
  parser.add_argument("--prompt")
  parser.add_argument("--prompts_file", help="a prompt a line, text or JSON")
  parser.add_argument("--chat", action="store_true", help="turns in the terminal")
  parser.add_argument("--jsonl", action="store_true", help="write a JSON object an answer")
  parser.add_argument("--mode", default="exact", help=", ".join(sampler.MODES))
  parser.add_argument("--block_size", type=int, default=8)
  parser.add_argument("--max_new_tokens", type=int, default=256)
  parser.add_argument("--draft", help=", ".join(sampler.DRAFTS))
  parser.add_argument("--refine_iter", type=int, default=2, help="passes a block, mode fixed")
  parser.add_argument("--tau", type=float, default=0.9, help="probability, mode threshold")
  parser.add_argument("--temperature", type=float, default=0.0)
  parser.add_argument("--top_k", type=int, default=0)
  parser.add_argument("--top_p", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--stop", action="append", default=[], help="a string that ends an answer")
  parser.add_argument("--html", help="a new file for the passes, coloured")
  parser.add_argument("--check", action="store_true", help="compare with one token a pass")
  arguments = parser.parse_args()
  names = (
    "mode", "block_size", "max_new_tokens", "draft", "refine_iter", "tau", "temperature",
    "top_k", "top_p", "seed", "stop",
  )  # fmt: skip
  options = {name: getattr(arguments, name) for name in names}
  if arguments.chat and (arguments.html or arguments.check):
    raise UserError("--html and --check go with prompts, not with --chat.")
  if arguments.html:
    refinement_html.refuse_existing(arguments.html)
    options["trace"] = True
  prompts = [] if arguments.chat else read_prompts(arguments)
  model = loading.load(arguments.model, dtype=arguments.dtype, step=arguments.step)
  model.require_tokenizer()
  if arguments.chat:
    chat(model, options)
    return
  compared = None
  if len(prompts) == 1 and not (arguments.jsonl or arguments.check):
    stream = generation.generate(model, prompts, stream=True, **options)
    show(stream)
    out = stream.result
  else:
    if arguments.check:
      compared = comparison.compare_with_ar(model, prompts, **options)
    out = compared.answers if compared else generation.generate(model, prompts, **options)
    print_answers(prompts, out, compared, arguments.jsonl)
  if arguments.html:
    refinement_html.write(out, arguments.html)


def print_answers(prompts, out, compared, as_json):
  for i, prompt in enumerate(prompts):
    answer = {"prompt": prompt, "text": out.texts[i], "tokens": len(out.tokens[i]),
              "passes": out.passes[i], "stopped": out.stopped[i]}  # fmt: skip
    if compared:
      row = compared.rows[i]
      answer |= {"differs_from_ar_at": row.offset, "margin": row.margin}
    print(json.dumps(answer, ensure_ascii=False) if as_json else f"{out.texts[i]}\n---")
  if compared:
    print(compared, file=sys.stderr)


if __name__ == "__main__":
  main()
