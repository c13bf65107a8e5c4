"""The door of planning/command.py: python -m refine_jax.plan --config=FILE --device=h100:8."""

import os

# Warnings of a compiler that has no device to try things out on; read where JAX is loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from refine_jax.planning.command import run  # noqa: E402

if __name__ == "__main__":
  run()
