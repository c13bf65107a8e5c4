"""Every key of a run, with its default. Experiments import this file and override.

    python -m refine_jax.main --config=configs/base.py --workdir=runs/mine \
        --config.model.pretrained=DIR_OR_HUB_NAME --config.data.train_files=train.parquet

The keys are declared in refine_jax/config/schema.py; docs/config.md and
`python -m refine_jax.main --help` list them. A key that is not declared is an error.
"""

from ml_collections import ConfigDict

from configs import recipes
from refine_jax.config import default_config


def get_config(recipe: str = "uniform") -> ConfigDict:
  return recipes.apply(default_config(), recipe).lock()
