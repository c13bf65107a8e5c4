"""DeepSeek-R1-Distill-Qwen-1.5B on one 80 GB GPU, the PyTorch original's settings.

    python -m refine_jax.main --config=configs/deepseek_r1_distill_qwen_1_5b.py \
        --workdir=runs/r1 --config.data.train_files=train.parquet
"""

from configs import base


def get_config(recipe: str = "uniform"):
  c = base.get_config(recipe)
  c.data.train_files = "train.parquet"
  c.model.pretrained = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
  c.optim.batch_size = 64
  c.optim.accumulation = 8
  return c
