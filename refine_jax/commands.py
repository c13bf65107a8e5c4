"""The program `refine-jax`: one table of its commands, each loaded when it is called."""

import difflib
import importlib
import sys
from typing import NamedTuple

from refine_jax.cli import entry_point
from refine_jax.errors import UserError


class Command(NamedTuple):
  """A command's function, as module:name, and what it does."""

  place: str
  meaning: str


COMMANDS = {
  "train": Command("refine_jax.main:run", "train a model"),
  "plan": Command("refine_jax.plan:run", "say what a run takes on devices that are not here"),
  "export": Command("refine_jax.export:main", "write a run as a Hugging Face directory"),
  "sample": Command("refine_jax.terminal.command:main", "answer prompts in the terminal"),
  "serve": Command("refine_jax.serving.command:main", "answer requests over HTTP"),
  "evaluate": Command("refine_jax.evaluation.evaluate:main", "score answers of several modes"),
  "lm-eval": Command("refine_jax.evaluation.lm_eval:main", "run EleutherAI's harness"),
  "tune": Command("refine_jax.evaluation.tune:main", "measure passes for draft=auto"),
  "convert-config": Command(
    "refine_jax.convert_config:main", "make a config of the PyTorch original's YAML"
  ),
  "doctor": Command("refine_jax.doctor:main", "say what is installed, and what is missing"),
}


def usage() -> str:
  """The text of `refine-jax --help`."""
  lines = ["usage: refine-jax COMMAND [OPTIONS]", ""]
  lines += [f"  {name:16}{command.meaning}" for name, command in COMMANDS.items()]
  return "\n".join([*lines, "", "refine-jax COMMAND --help lists a command's options.", ""])


@entry_point
def main() -> int | None:
  """Runs the command that the first argument names.

  Raises:
    UserError: there is no such command.
  """
  name, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
  if name in ("", "help", "--help", "-h"):
    print(usage(), end="")
    return 0 if name else 2
  if name == "--version":
    import refine_jax

    print(refine_jax.__version__)
    return 0
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    asked = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{name!r} is no command of refine-jax: {', '.join(COMMANDS)}.{asked}")
  module, _, function = COMMANDS[name].place.partition(":")
  sys.argv = [f"refine-jax {name}", *rest]
  return getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
  main()
