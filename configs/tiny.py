"""The quickstart: a decoder of under a million parameters, from scratch, on a CPU.

python scripts/make_tiny_data.py
python -m refine_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from configs import base


def get_config(recipe: str = "uniform"):
  c = base.get_config(recipe)
  c.data.train_files = "data/tiny/train.parquet"
  c.data.val_files = "data/tiny/val.parquet"
  c.data.max_length = 128
  c.model.config = "data/tiny/model"
  c.model.compute_dtype = "float32"
  c.optim.batch_size = 16
  c.optim.total_steps = 300
  c.optim.lr = 3e-3
  c.optim.warmup_ratio = 0.1
  c.checkpoint.save_every = 150
  c.eval.eval_every = 150
  c.log.every = 25
  if recipe == "gated":
    # The export of a run of ar_sft.
    c.model.config, c.model.pretrained = "", "models/tiny"
    c.adapter.rank, c.adapter.alpha = 32, 128.0
    c.optim.lr = 3e-3
  return c
