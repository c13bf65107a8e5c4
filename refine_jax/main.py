"""Trains: refine-jax train --config=FILE[:RECIPE] --workdir=DIR [--config.KEY=VALUE].

`python -m refine_jax.main` is the same.
"""

import os
import sys

from absl import flags, logging

from refine_jax.cli import entry_point
from refine_jax.config import command_line, from_config_dict
from refine_jax.config.describe import help_text
from refine_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, logs, metrics.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Say what would be done, with an example; train and write nothing."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other processes of this run; implied by the three flags below."
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT, where process 0 listens.")
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_INDEX = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_HELP = {"--help", "-help", "-h", "-?", "--helpshort", "--helpfull"}


def main(argv: list[str]) -> int:
  """Trains as the arguments say; returns the exit status.

  Raises:
    UserError: an argument, a key or a value that is not right, and all that training raises.
  """
  config, rest = command_line.parse(argv, flags.FLAGS)
  if len(rest) > 1:
    raise UserError(f"Unexpected argument {rest[1]!r}; options start with --.")
  workdir = _WORKDIR.value
  if not workdir and not _DRY_RUN.value:
    raise UserError("--workdir is missing; name a directory for the run.")
  checked = from_config_dict(config)
  # JAX takes three quarters of a GPU by default; a training run has it to itself. The rest is for
  # the libraries' own workspaces.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  # After the flags: importing jax takes seconds, and --help should not.
  from refine_jax import distributed
  from refine_jax.training import dry_run, train

  logging.set_verbosity(logging.INFO if os.environ.get("REFINE_JAX_VERBOSE") else logging.WARNING)
  if _DRY_RUN.value or not workdir:
    return dry_run.run(checked, workdir)
  given = (_ADDRESS.value, _COUNT.value, _INDEX.value)
  if not _DISTRIBUTED.value and all(value is None for value in given):
    return train.run(checked, workdir)
  with distributed.joined(distributed.find_place(*given, os.environ)):
    return train.run(checked, workdir)


@entry_point
def run() -> int | None:
  if _HELP & set(sys.argv[1:]):
    print(help_text(), end="")
    return 0
  return main(sys.argv)


if __name__ == "__main__":
  run()
