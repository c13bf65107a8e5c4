"""ml_collections' ConfigDict <-> the frozen dataclasses of schema.

Both directions are strict: an unknown key and a missing one are errors.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from refine_jax.config import checks
from refine_jax.config.key import keys_of, nearest, sections_of
from refine_jax.config.schema import Config
from refine_jax.errors import UserError
from refine_jax.quoting import shown


def default_config() -> ConfigDict:
  """Every key with its default, to be changed; `configs/base.py` hands it to experiments."""
  config = ConfigDict({name: key.default for name, key in keys_of(Config).items()})
  for section, kind in sections_of(Config).items():
    config[section] = ConfigDict({name: key.default for name, key in keys_of(kind).items()})
  return config


def from_config_dict(config: ConfigDict | dict) -> Config:
  """Checks every key and returns the frozen configuration.

  Raises:
    UserError: an unknown or missing key, a wrong type or value, or values that contradict each
      other.
  """
  check_names(config)
  sections: dict[str, Any] = {name: config[name] for name in sections_of(Config)}
  values: dict[str, Any] = {n: key.convert(config[n]) for n, key in keys_of(Config).items()}
  for section, kind in sections_of(Config).items():
    values[section] = kind(
      **{
        # Messages say the whole name.
        name: key.within(section).convert(sections[section][name])
        for name, key in keys_of(kind).items()
      }
    )
  result = Config(**values)
  checks.check(result)
  return result


def check_names(config: ConfigDict | dict) -> None:
  """Raises UserError where a key is missing, or is none of the schema's."""
  _check_names(config, [*keys_of(Config), *sections_of(Config)], "")
  for section, kind in sections_of(Config).items():
    _check_names(config[section], list(keys_of(kind)), f"{section}.")


def _check_names(config: Any, known: Iterable[str], prefix: str):
  if not isinstance(config, ConfigDict | dict):
    raise UserError(f"config.{prefix[:-1]} must be a ConfigDict, not {shown(config)}.")
  for name in config:
    if name not in known:
      raise UserError(
        f"Unknown config key {f'{prefix}{name}'!r}.{nearest(str(name), known)}"
        " python -m refine_jax.main --help lists them all."
      )
  missing = [prefix + name for name in known if name not in config]
  if missing:
    raise UserError(f"Config keys missing: {', '.join(missing)}. Start from configs/base.py.")
