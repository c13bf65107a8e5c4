"""Makes a config of the PyTorch original's iterative_refine.yaml.

    refine-jax convert-config iterative_refine.yaml [KEY=VALUE ..] [--gpus=4] [--output=mine.py]

Every key of the YAML becomes a line of the config, or a comment that says why not.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from refine_jax import files
from refine_jax.cli import entry_point, whole_number
from refine_jax.config import default_config, from_config_dict
from refine_jax.config.key import Key, all_keys, nearest, warn
from refine_jax.config.schema import Config
from refine_jax.errors import UserError
from refine_jax.quoting import reason, shown

_MOST_KEYS, _DEEPEST = 1000, 8
_LOGGERS = ("console", "tensorboard", "wandb")


class Rule(NamedTuple):
  """What becomes of a key of the original.

  Attributes:
    ours: the key here; empty where there is none.
    note: for the documentation, and, where there is no key here, why.
    convert: its value as ours.
  """

  ours: str
  note: str = ""
  convert: Callable[[Any], Any] = lambda value: value


def _files(value):
  return ",".join(map(str, value)) if isinstance(value, list) else value


def _loggers(value):
  named = value if isinstance(value, list) else [value]
  return tuple(name for name in named if name in _LOGGERS)


RULES = {
  "data.train_files": Rule("data.train_files", "a list becomes names with commas", _files),
  "data.val_files": Rule("data.val_files", "here it is used: see eval.eval_every", _files),
  "data.prompt_key": Rule("data.prompt_key"),
  "data.response_key": Rule("data.response_key"),
  "data.max_length": Rule("data.max_length"),
  "data.truncation": Rule("data.truncation"),
  "data.micro_batch_size_per_gpu": Rule(
    "optim.batch_size",
    "times optim.gradient_accumulation_steps and --gpus. A row here holds several examples; with"
    " data.pack=False it holds one, as there",
  ),
  "data.pad_token_id": Rule("", "padding is never attended, noised or scored here"),
  "model.partial_pretrain": Rule("model.pretrained"),
  "model.trust_remote_code": Rule("model.trust_remote_code"),
  "model.enable_gradient_checkpointing": Rule(
    "model.remat",
    "True: auto, which recomputes the least that fits; False: none",
    lambda value: {True: "auto", False: "none"}.get(value, value),
  ),
  "model.tensor_parallel_size": Rule("mesh.tensor"),
  "model.cpu_offload": Rule(
    "", "nothing is offloaded here; the recipe gated, mesh.fsdp and model.remat save memory"
  ),
  "optim.lr": Rule("optim.lr"),
  "optim.betas": Rule("optim.betas"),
  "optim.weight_decay": Rule("optim.weight_decay", "not of norms and biases here"),
  "optim.warmup_steps_ratio": Rule("optim.warmup_ratio"),
  "optim.clip_grad": Rule("optim.clip_grad"),
  "optim.gradient_accumulation_steps": Rule("optim.accumulation"),
  "trainer.total_epochs": Rule("optim.total_epochs"),
  "trainer.save_checkpoint_steps": Rule("checkpoint.save_every", "optimizer steps"),
  "trainer.max_ckpt_to_keep": Rule("checkpoint.max_ckpt_to_keep"),
  "trainer.default_local_dir": Rule("", "it is given with the command: --workdir"),
  "trainer.project_name": Rule("log.project_name"),
  "trainer.experiment_name": Rule("log.experiment_name"),
  "trainer.logger": Rule("log.logger", "those that there are here", _loggers),
  "trainer.resume_mode": Rule("checkpoint.resume_mode"),
  "trainer.resume_from_path": Rule(
    "checkpoint.resume_from_path", "a workdir of this project; empty: none", lambda v: v or ""
  ),
  "trainer.max_debug_steps": Rule(
    "", "log.debug_every says how often an example is shown in WORKDIR/log/debug.log"
  ),
  "iterative.num_iterations": Rule("objective.num_iterations"),
  "iterative.noise_min": Rule("noise.noise_min"),
  "iterative.noise_max": Rule("noise.noise_max"),
  "iterative.loss_weights": Rule("objective.loss_weights"),
}
_MICRO, _ACCUMULATION = "data.micro_batch_size_per_gpu", "optim.gradient_accumulation_steps"
# The original's own defaults, where they make a batch.
_BATCH = {_MICRO: 2, _ACCUMULATION: 64}
# What the recipes here set too.
_RECIPE_SETS = ("objective.", "noise.", "optim.lr")
_CONFIG_HEAD = """\
from configs import base


def get_config(recipe: str = "uniform"):
  c = base.get_config(recipe)
"""


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """The YAML's values by their names with dots, with what KEY=VALUE sets over them.

  Raises:
    UserError: it cannot be read, is no YAML of sections and values, or an override is none.
  """
  try:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({reason(error)}).") from error
  except (yaml.YAMLError, ValueError) as error:
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark else ""
    raise UserError(f"{path}{line}: it is no YAML ({reason(error)}).") from error
  if not isinstance(tree, dict):
    raise UserError(f"{path} holds no sections of keys, as iterative_refine.yaml does.")
  values: dict[str, Any] = {}
  _flatten(tree, "", values, path, _DEEPEST)
  for override in overrides:
    name, given, text = override.lstrip("+").partition("=")
    try:
      value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
      given, value = "", None
    if not given or not name:
      raise UserError(f"{override!r} is no KEY=VALUE.")
    values[name] = value
  return values


def _flatten(tree, prefix, values, path, deepest):
  for name, value in tree.items():
    if isinstance(value, dict) and value and deepest:
      _flatten(value, f"{prefix}{name}.", values, path, deepest - 1)
    else:
      values[f"{prefix}{name}"] = value
    if len(values) > _MOST_KEYS:
      raise UserError(f"{path} has more than {_MOST_KEYS} keys; it is no iterative_refine.yaml.")


def convert(values: dict[str, Any], *, gpus: int = 1) -> tuple[dict[str, Any], dict[str, str]]:
  """The values here, by key, and why each other one is not taken over, by the original's key.

  Raises:
    UserError: a value that the key here does not take.
  """
  keys = {key.name: key for key in all_keys(Config)}
  ours: dict[str, Any] = {}
  left: dict[str, str] = {}
  batch = {}
  for name, default in _BATCH.items():
    value = values.get(name)
    batch[name] = _value(name, keys["optim.accumulation"], default if value is None else value)
  for name, value in values.items():
    rule = RULES.get(name)
    if rule is None:
      left[name] = f"no key of the original that is known here;{nearest(name, RULES)}"
      left[name] = left[name].removesuffix(";")
    elif not rule.ours:
      left[name] = rule.note
    elif isinstance(value, str) and "${" in value:
      left[name] = f"it refers to other values; set {rule.ours} to what it stands for"
    elif value is None:
      left[name] = f"it is empty; {rule.ours} has its default"
    elif name not in _BATCH:
      ours[rule.ours] = _value(name, keys[rule.ours], rule.convert(value))
  if lost := [x for x in _listed(values.get("trainer.logger")) if x not in _LOGGERS]:
    left["trainer.logger"] = f"of these there is no {', '.join(map(shown, lost))} here"
  ours["optim.batch_size"] = _value(
    _MICRO, keys["optim.batch_size"], batch[_MICRO] * batch[_ACCUMULATION] * gpus
  )
  ours["optim.accumulation"] = batch[_ACCUMULATION]
  if gpus > 1:  # the original splits parameters over all of them
    ours |= {"mesh.data": 1, "mesh.fsdp": -1}
  return ours, left


def _listed(value) -> list:
  return value if isinstance(value, list) else [] if value is None else [value]


def _value(name: str, key: Key, value: Any) -> Any:
  """The value as the key here takes it; YAML reads 1e-5, which has no point, as text."""
  if key.kind is float:
    value = [_number(v) for v in value] if isinstance(value, list) else _number(value)
  try:
    return key.convert(value)
  except UserError as error:
    raise UserError(f"{name}={shown(value)}: {error}") from None


def _number(value):
  try:
    return float(value) if isinstance(value, str) else value
  except ValueError:
    return value


def as_python(source: str, values: dict[str, Any], *, gpus: int = 1) -> str:
  """The config file.

  Args:
    source: the YAML's name.
    values: from `read`.
  """
  ours, left = convert(values, gpus=gpus)
  workdir = values.get("trainer.default_local_dir") or "runs/mine"
  lines = [
    f"# Made of {shown(source)} by refine-jax convert-config, for {gpus} GPU(s).",
    f"# refine-jax train --config=THIS_FILE --workdir={shown(workdir)}",
    "",
    _CONFIG_HEAD.rstrip("\n"),
  ]
  plain = {k: v for k, v in ours.items() if not k.startswith(_RECIPE_SETS)}
  lines += [f"  c.{key} = {value!r}" for key, value in plain.items()]
  if len(plain) < len(ours):
    lines.append('  if recipe == "uniform":  # the method as the original trains it')
    lines += [f"    c.{k} = {v!r}" for k, v in ours.items() if k not in plain]
  lines += [f"  # {_plain(name)} = {shown(values[name])}: {why}" for name, why in left.items()]
  return "\n".join([*lines, "  return c", ""])


def _plain(name: str) -> str:
  return name if re.fullmatch(r"[\w.]+", name) else shown(name)


def markdown() -> str:
  """The table of docs/migration.md."""
  lines = ["| there | here | |", "| --- | --- | --- |"]
  for name, rule in RULES.items():
    lines.append(f"| `{name}` | {f'`{rule.ours}`' if rule.ours else 'none'} | {rule.note} |")
  return "\n".join(lines) + "\n"


@entry_point
def main() -> None:
  """Runs `refine-jax convert-config`."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("yaml", help="the original's config/iterative_refine.yaml")
  parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as the original's train.sh takes")
  parser.add_argument(
    "--gpus", type=whole_number("--gpus", 1), default=1, help="those of the original's run (1)"
  )
  parser.add_argument("--output", help="a new file; default: standard output")
  arguments = parser.parse_args()
  path = files.local_path(arguments.yaml, "the YAML file")
  output = files.local_path(arguments.output, "--output") if arguments.output else None
  if output is not None and output.exists():
    raise UserError(f"{output} is there already; name a new file.")
  values = read(path, arguments.overrides)
  text = as_python(path.name, values, gpus=arguments.gpus)
  if output is None:
    print(text, end="")
  else:
    with files.write_errors(output), files.new_file(output) as unfinished:
      unfinished.write_text(text, encoding="utf-8")
  ours, left = convert(values, gpus=arguments.gpus)
  for name, why in left.items():
    if name not in RULES or RULES[name].ours:
      warn(f"{_plain(name)}: {why}.")
  _warn_of_contradictions(ours)


def _warn_of_contradictions(ours: dict[str, Any]):
  config: Any = default_config().to_dict()
  for name, value in ours.items():
    section, _, last = name.rpartition(".")
    config[section][last] = value
  try:
    from_config_dict(config)
  except UserError as error:
    warn(f"the config needs a change before it can be used: {error}")


if __name__ == "__main__":
  main()
