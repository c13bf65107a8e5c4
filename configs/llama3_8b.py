"""Llama-3-8B over eight 80 GB GPUs: parameters and moments are split over all of them.

    python -m refine_jax.main --config=configs/llama3_8b.py --workdir=runs/llama3 \
        --config.data.train_files=train.parquet --config.data.val_files=val.parquet
"""

from configs import base


def get_config(recipe: str = "uniform"):
  c = base.get_config(recipe)
  c.data.train_files = "train.parquet"
  c.model.pretrained = "meta-llama/Meta-Llama-3-8B-Instruct"
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.optim.batch_size = 64
  c.optim.accumulation = 4
  return c
