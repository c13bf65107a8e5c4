"""Trains: python -m refine_jax.main --config=configs/x.py --workdir=DIR [--config.KEY=VALUE]."""

import os
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from refine_jax.cli import entry_point
from refine_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, logs, metrics.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other hosts of this job (jax.distributed.initialize)."
)


def main(argv):
  if len(argv) > 1:
    raise UserError(f"Unexpected argument {argv[1]!r}; options start with --.")
  if not _WORKDIR.value:
    raise UserError("--workdir is missing; name a directory for the run.")
  # JAX takes three quarters of a GPU by default; a training run has it to itself. The rest is for
  # the libraries' own workspaces.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  # After the flags: importing jax takes seconds, and --help should not.
  import jax

  from refine_jax.config import from_config_dict
  from refine_jax.training import train

  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  logging.set_verbosity(logging.INFO if os.environ.get("REFINE_JAX_VERBOSE") else logging.WARNING)
  return train.run(from_config_dict(_CONFIG.value), _WORKDIR.value)


def _parse_flags(argv):
  """absl's flags, with what a user can get wrong in a config as a UserError."""
  app.define_help_flags()
  for argument in argv:
    name, given, value = argument.partition("=")
    file = value.partition(":")[0]  # a recipe may follow
    if given and name.lstrip("-") == "config" and not Path(file).is_file():
      raise UserError(f"--config names {file!r}, and there is no such file.")
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    raise UserError(_in_one_line(error, argv)) from error
  if _CONFIG.value is None:
    raise UserError("--config is missing; name a file such as configs/tiny.py.")
  return rest


def _in_one_line(error, argv) -> str:
  """What ConfigDict says of a key that is not there, of a wrong type, of a file that fails."""
  text = str(error.args[0] if error.args else error)
  near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
  if near:
    right, wrong = near.groups()
    given = next((a for a in argv if re.search(rf"\.{wrong}\b", a.partition("=")[0])), wrong)
    return f"{given}: there is no key {wrong!r}; did you mean {right!r}?"
  if "Traceback" in text:  # of the config file's own error, which its last line is
    return f"{text.partition(': ')[0]}: {text.strip().splitlines()[-1]}"
  return text


@entry_point
def run():
  return main(_parse_flags(sys.argv))


if __name__ == "__main__":
  run()
