"""Does it decode in parallel without getting worse? At a size for a CPU (docs/results.md).

    python scripts/make_tiny_data.py data/sums --problems=sums
    python -m refine_jax.main --config=configs/sums.py:ar_sft --workdir=runs/sums_ar
    python scripts/export_hf.py --workdir=runs/sums_ar --output=models/sums_ar --dtype=float32
    python -m refine_jax.main --config=configs/sums.py:blocks --workdir=runs/sums_blocks \
        --config.model.config= --config.model.pretrained=models/sums_ar \
        --config.optim.total_steps=600 --config.optim.lr=1e-3
    python -m refine_jax.evaluate --model=runs/sums_blocks --data=data/sums/test.parquet \
        --scorer=numeric --modes=exact:branches,exact:tail --block_sizes=4,8
"""

from configs import tiny


def get_config(recipe: str = "uniform"):
  c = tiny.get_config(recipe)
  c.data.train_files = "data/sums/train.parquet"
  c.data.val_files = "data/sums/val.parquet"
  c.model.config = "data/sums/model"
  c.optim.total_steps = 1200
  c.optim.lr = 2e-3
  return c
