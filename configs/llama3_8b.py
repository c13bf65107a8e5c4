"""Llama-3-8B: a gated adapter on one 80 GB GPU, or all weights over eight of them.

    python -m refine_jax.main --config=configs/llama3_8b.py:gated --workdir=runs/llama3-gated \
        --config.data.train_files=train.parquet --config.data.val_files=val.parquet

Without `:gated` parameters and moments are split over all devices; docs/adapters.md says what one
GPU has to hold with it.
"""

from configs import base


def get_config(recipe: str = "uniform"):
  c = base.get_config(recipe)
  c.data.train_files = "train.parquet"
  c.model.pretrained = "meta-llama/Meta-Llama-3-8B-Instruct"
  if recipe == "gated":
    c.data.max_length = 4096
    c.optim.batch_size = 4
    c.optim.accumulation = 4
    # <|reserved_special_token_0|>, which no text has.
    c.noise.token = 128002
    return c
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.optim.batch_size = 64
  c.optim.accumulation = 4
  return c
