"""The door of terminal/command.py: python -m refine_jax.sample --model=DIR --prompt=TEXT."""

from refine_jax.terminal.command import main

if __name__ == "__main__":
  main()
