"""The door of evaluation/evaluate.py: python -m refine_jax.evaluate --model=.. --data=.."""

from refine_jax.evaluation.evaluate import main

if __name__ == "__main__":
  main()
