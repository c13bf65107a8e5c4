"""ml_collections' ConfigDict -> frozen, checked dataclasses.

`configs/base.py` holds the keys, their defaults and what they mean; the dataclasses here hold
their types. Both directions are strict: an unknown key and a missing one are errors.
"""

import dataclasses
import math
import types
import typing

from ml_collections import ConfigDict

from refine_jax.config import checks
from refine_jax.config.checks import nearest
from refine_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  train_files: str
  val_files: str
  prompt_key: str
  response_key: str
  max_length: int
  truncation: str
  pack: bool
  max_segments: int
  chat_template: str
  cache_dir: str
  prefetch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
  """Where the model comes from and how it is computed; its shape is model.ModelConfig."""

  pretrained: str
  config: str
  tokenizer: str
  trust_remote_code: bool
  compute_dtype: str
  attention: str
  remat: str
  scan_unroll: int
  head_chunk: int
  head_gradient: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  num_iterations: int
  loss_weights: tuple[float, ...]
  clean_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
  kind: str
  block_size: int
  offset_decay: float
  noise_min: float
  noise_max: float
  token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  batch_size: int
  accumulation: int
  total_epochs: int
  total_steps: int
  lr: float
  warmup_ratio: float
  betas: tuple[float, ...]
  eps: float
  weight_decay: float
  clip_grad: float
  moment_dtype: str
  max_nonfinite: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  save_every: int
  max_ckpt_to_keep: int
  resume_mode: str
  resume_from_path: str
  allow_changes: tuple[str, ...]
  save_hf: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  eval_every: int
  batch_size: int
  generate_every: int
  generate_file: str
  generate_rows: int
  generate_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  every: int
  debug_every: int
  logger: tuple[str, ...]
  project_name: str
  experiment_name: str
  profile_steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  seed: int
  data: DataConfig
  model: ModelSource
  objective: ObjectiveConfig
  noise: NoiseConfig
  optim: OptimConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig
  eval: EvalConfig
  log: LogConfig

  def to_dict(self) -> dict:
    """Plain dicts, lists and scalars, as JSON holds them."""
    return dataclasses.asdict(self)


def from_config_dict(config: ConfigDict) -> Config:
  """Checks every key and returns the frozen configuration.

  Raises:
    UserError: an unknown or missing key, a wrong type, or values that contradict each other.
  """
  result = _build(Config, config, "")
  checks.check(result)
  return result


def _build(cls, config, prefix):
  if not isinstance(config, (ConfigDict, dict)):
    raise UserError(f"config.{prefix[:-1]} must be a ConfigDict, not {config!r}.")
  types_ = typing.get_type_hints(cls)
  for key in config:
    if key not in types_:
      raise UserError(
        f"Unknown config key {prefix + key!r}.{nearest(key, types_)}"
        f" configs/base.py lists them all."
      )
  missing = [prefix + key for key in types_ if key not in config]
  if missing:
    raise UserError(f"Config keys missing: {', '.join(missing)}. Start from configs/base.py.")
  values = {}
  for key, kind in types_.items():
    if dataclasses.is_dataclass(kind):
      values[key] = _build(kind, config[key], f"{prefix}{key}.")
    else:
      values[key] = _convert(prefix + key, config[key], kind)
  return cls(**values)


def _convert(name, value, kind):
  """`value` as `kind`; an int passes for a float, a list for a tuple, nothing else changes."""
  if isinstance(kind, types.GenericAlias):  # tuple[X, ...]
    if isinstance(value, (list, tuple)):
      return tuple(_convert(name, v, kind.__args__[0]) for v in value)
    kind_name = f"a sequence of {kind.__args__[0].__name__}"
  else:
    kind_name = kind.__name__
    if kind is float and type(value) in (int, float) and math.isfinite(value):
      return float(value)
    if type(value) is kind and kind is not float:
      return value
  raise UserError(f"config.{name} must be {kind_name}, not {value!r}.")
