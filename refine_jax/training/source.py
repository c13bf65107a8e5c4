"""Where a run's model comes from."""

import dataclasses
from pathlib import Path

from refine_jax.config import Config
from refine_jax.hf import config as hf_config
from refine_jax.hf import weights as hf_weights
from refine_jax.model.transformer import ModelConfig
from refine_jax.text.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """Where the model comes from: `directory` has weights only if `pretrained`."""

  directory: Path
  pretrained: bool
  model: ModelConfig
  tokenizer: Tokenizer


def read_source(config: Config, *, weights: bool = True) -> ModelSource:
  """Reads config.json and the tokenizer; the weights come later, straight to their devices.

  Args:
    weights: whether a hub's model.pretrained is fetched with its weights.
  """
  name = config.model.pretrained or config.model.config
  directory = hf_weights.find(name, weights=weights and bool(config.model.pretrained))
  tokenizer = load_tokenizer(
    config.model.tokenizer or directory, trust_remote_code=config.model.trust_remote_code
  )
  return ModelSource(
    directory=directory,
    pretrained=bool(config.model.pretrained),
    model=hf_config.read_model_config(directory),
    tokenizer=tokenizer,
  )
