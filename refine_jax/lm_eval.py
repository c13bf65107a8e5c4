"""The door of evaluation/lm_eval.py: python -m refine_jax.lm_eval --model refine_jax .."""

from refine_jax.evaluation.lm_eval import RefineLM, main

__all__ = ["RefineLM", "main"]

if __name__ == "__main__":
  main()
