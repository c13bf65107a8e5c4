"""What command-line programs do with errors."""

import functools
import sys

from refine_jax.errors import UserError


def entry_point(main):
  """Runs `main`; a UserError becomes one line on stderr and exit status 1."""

  @functools.wraps(main)
  def run():
    try:
      sys.exit(main())
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(1)

  return run
