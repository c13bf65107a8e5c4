"""From parquet to packed rows: parquet -> chat -> tokenize -> store -> packing -> pipeline."""

from refine_jax.data.pipeline import Rows, eval_batches, eval_rows, train_iterator, train_rows
from refine_jax.data.store import Examples
from refine_jax.data.tokenize import load_examples

__all__ = [
  "Examples",
  "Rows",
  "eval_batches",
  "eval_rows",
  "load_examples",
  "train_iterator",
  "train_rows",
]
