"""The door of evaluation/tune.py: python -m refine_jax.tune --model=.. --data=.."""

from refine_jax.evaluation.tune import main

if __name__ == "__main__":
  main()
