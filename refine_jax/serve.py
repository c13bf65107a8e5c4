"""The door of serving/command.py: python -m refine_jax.serve --model=DIR [--port=8000]."""

from refine_jax.serving.command import main

if __name__ == "__main__":
  main()
