"""Trains: python -m refine_jax.main --config=configs/x.py --workdir=DIR [--config.KEY=VALUE]."""

import dataclasses
import os
import re
import sys
import traceback
import typing
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
  file = _config_file(argv)
  if file is not None and not Path(file).is_file():
    raise UserError(f"--config names {file!r}, and there is no such file.")
  keys = [a for a in argv if re.match(r"--?config\.", a)]
  if file is None and keys:
    raise UserError(f"{keys[0]}: --config is missing; name a file such as configs/tiny.py.")
  for argument in keys:
    _check_key(argument)
  try:
    rest = flags.FLAGS(argv)
    config = _CONFIG.value
  except Exception as error:  # the config file is a program, which may raise anything
    raise UserError(_in_one_line(error, file)) from error
  if config is None:
    reason = f"{file}: get_config() returned nothing" if file else "--config is missing"
    raise UserError(f"{reason}; name a file such as configs/tiny.py.")
  return rest


def _config_file(argv) -> str | None:
  """The file that --config names, as --config=FILE:RECIPE or --config FILE:RECIPE."""
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    name, given, value = argument.partition("=")
    if name in ("--config", "-config"):
      return (value if given else following).partition(":")[0]
  return None


def _check_key(argument: str):
  """Raises UserError where --config.KEY=VALUE names no key, with the nearest that there is."""
  from refine_jax.config import Config
  from refine_jax.config.checks import nearest

  place, kind = "config", Config
  for part in argument.partition("=")[0].lstrip("-").split(".")[1:]:
    if not dataclasses.is_dataclass(kind):
      raise UserError(f"{argument}: {place} is a value, with no keys in it.")
    known = typing.get_type_hints(kind)
    name = re.sub(r"\[\d+\]$", "", part)  # one element of a tuple
    if name not in known:
      hint = nearest(name, known).strip() or f"It has {', '.join(known)}."
      raise UserError(
        f"{argument}: there is no key {name!r} in {place}; {hint[:1].lower()}{hint[1:]}"
      )
    place, kind = f"{place}.{part}", known[name]


def _in_one_line(error, file) -> str:
  """What absl says of a flag, or of a config file that fails, where in it."""
  text = str(error.args[0] if error.args else error).strip()
  if "Traceback" in text:  # of the config file's own error, which its last line is
    return f"{text.partition(': ')[0]}: {text.splitlines()[-1]}"
  if isinstance(error, flags.Error):
    return text
  if "has no attribute 'get_config'" in text:
    return f"{file} has no get_config(); start from configs/base.py."
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
  line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
  where = f"{file}, line {line}" if line else file
  return f"--config={where}: {type(error).__name__}: {text}"


@entry_point
def run():
  return main(_parse_flags(sys.argv))


if __name__ == "__main__":
  run()
