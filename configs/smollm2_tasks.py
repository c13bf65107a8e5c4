"""SmolLM2-135M-Instruct on six verifiable reasoning tasks; minutes on one GPU.

    pip install -e '.[gpu,tasks]'
    python scripts/make_smollm2.py models/smollm2-135m
    python scripts/make_tasks.py data/tasks
    python -m refine_jax.main --config=configs/smollm2_tasks.py --workdir=runs/smollm2_tasks
    python -m refine_jax.evaluate --model=runs/smollm2_tasks --data=data/tasks/test.parquet \
        --modes=ar,exact --block_sizes=4,8,16,32

After the file's name, a recipe of configs/recipes.py: configs/smollm2_tasks.py:ar_sft.
scripts/experiment_tasks.py runs and compares them all.
"""

from configs import base


def get_config(recipe: str = "uniform"):
  c = base.get_config(recipe)
  c.data.train_files = "data/tasks/train.parquet"
  c.data.val_files = "data/tasks/val.parquet"
  c.data.max_length = 512
  c.model.pretrained = "models/smollm2-135m"
  # About 64 examples: four or five fill a row.
  c.optim.batch_size = 16
  c.optim.lr = 2e-4
  c.optim.total_epochs = 3
  c.checkpoint.save_every = 500
  c.eval.eval_every = 200
  c.log.every = 20
  if recipe == "gated":
    # The export of a run of ar_sft (scripts/export_hf.py --dtype=float32).
    c.model.pretrained = "models/smollm2-135m-tasks"
    c.optim.lr = 5e-4
  if recipe in ("blocks", "gated"):
    # <reponame>, which no text here has: EOS would have to mean noise and the end at once.
    c.noise.token = 4
  return c
