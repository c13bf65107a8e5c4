"""From parquet to packed rows: parquet -> chat -> tokenize -> packing -> pipeline."""

from refine_jax.data.pipeline import Rows, eval_batches, train_iterator, train_rows
from refine_jax.data.tokenize import Examples, load_examples

__all__ = ["Examples", "Rows", "eval_batches", "load_examples", "train_iterator", "train_rows"]
