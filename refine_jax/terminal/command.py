"""Answers prompts in the terminal, committed text as it comes.

    refine-jax sample --model=DIR --prompt="What is 2+2?" [--mode=exact] [--block_size=8]
    refine-jax sample --model=DIR --prompts_file=prompts.txt --jsonl > answers.jsonl
    refine-jax sample --model=DIR --chat
    refine-jax sample --model=DIR --prompt="What is 2+2?" --html=passes.html

Prompts are lines, of a file or of standard input: text, or JSON {"prompt": ..} with a string, chat
messages or token ids. Answers go to standard output in their order, each as soon as it is there;
one prompt at a time streams. Numbers go to standard error. --html writes how the answers came to
be, pass by pass, to be opened in a browser. --check decodes once more, one token a pass, and says
where answers part. A prompt that cannot be answered has an error in its place, and the exit status
is 1 at the end.
"""

import argparse

from refine_jax.cli import entry_point
from refine_jax.decoding import loading, trace_html
from refine_jax.decoding.options import DRAFTS, MODES, Options
from refine_jax.errors import UserError
from refine_jax.files import local_path
from refine_jax.hf import export as hf_export
from refine_jax.terminal import answers, conversation
from refine_jax.terminal.prompts import check_template, read_prompts


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
  add(
    "--chat",
    action="store_true",
    help=f"turns; {conversation.FORGET} starts over, Ctrl-C cuts an answer",
  )
  add("--jsonl", action="store_true", help="write a JSON object an answer")
  add("--html", help="a new file for the passes, coloured")
  add("--svg", help="a new file: the first answer, growing pass by pass")
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


def check(arguments: argparse.Namespace, options: dict) -> None:
  """Raises UserError for what would fail after the model is loaded."""
  Options(**options)
  given = [
    n
    for n in ("prompt", "prompts_file", "jsonl", "html", "svg", "check")
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
  for name in ("html", "svg"):
    if getattr(arguments, name):
      place = local_path(getattr(arguments, name), f"--{name}")
      setattr(arguments, name, trace_html.refuse_existing(place))


@entry_point
def main() -> int | None:
  """Runs `refine-jax sample`; exit status 1 where a prompt could not be answered."""
  arguments, options = parse()
  check(arguments, options)
  prompts = [] if arguments.chat else read_prompts(arguments)
  model = loading.load(arguments.model, dtype=arguments.dtype, step=arguments.step)
  check_template(model, prompts, arguments)
  options["chat_template"] = arguments.chat_template
  if arguments.chat:
    return conversation.chat(model, options)
  return answers.answer(model, prompts, arguments, options)
