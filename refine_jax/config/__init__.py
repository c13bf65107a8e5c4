"""Every key of a run: `schema` declares them, `checks` has the rules between them."""

from refine_jax.config.build import default_config, from_config_dict
from refine_jax.config.schema import (
  AdapterConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  LogConfig,
  MeshConfig,
  ModelSource,
  NoiseConfig,
  ObjectiveConfig,
  OptimConfig,
)

__all__ = [
  "AdapterConfig",
  "CheckpointConfig",
  "Config",
  "DataConfig",
  "EvalConfig",
  "LogConfig",
  "MeshConfig",
  "ModelSource",
  "NoiseConfig",
  "ObjectiveConfig",
  "OptimConfig",
  "default_config",
  "from_config_dict",
]
