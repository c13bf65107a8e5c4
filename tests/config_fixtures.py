"""Configs for the tests: read from a command line as a run reads it, or made of the defaults."""

from pathlib import Path

import pytest
from absl import flags

from refine_jax.config import Config, command_line, default_config, from_config_dict
from refine_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def parse_with_workdir(*arguments: str, config: str | None) -> tuple[Config, str | None]:
  """(config, --workdir) that a run of these arguments would get, with flags of its own."""
  first = [] if config is None else [f"--config={config}"]
  flag_values = flags.FlagValues()
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=flag_values)
  parsed, rest = command_line.parse(["main", *first, *arguments], flag_values)
  assert rest == ["main"]
  return from_config_dict(parsed), workdir.value


def parse(*arguments: str, config: str | None = f"{ROOT}/configs/tiny.py") -> Config:
  """What a run of these arguments would get."""
  return parse_with_workdir(*arguments, config=config)[0]


def refusal(*arguments: str, **options) -> str:
  with pytest.raises(UserError) as error:
    parse(*arguments, **options)
  assert "\n" not in str(error.value)
  return str(error.value)


def changed(name: str, value) -> Config:
  """The defaults with a model, files and one value more, of whatever type."""
  c = default_config().to_dict()
  c["data"]["train_files"], c["model"]["config"] = "x.parquet", "model"
  *section, last = name.split(".")
  (c[section[0]] if section else c)[last] = value
  return from_config_dict(c)
