"""Every key of a run: `schema` has the types, `checks` which values make sense."""

from refine_jax.config.schema import (
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
  from_config_dict,
)

__all__ = [
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
  "from_config_dict",
]
