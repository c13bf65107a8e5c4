"""generation_config.json and what it says to the sampler: ends of an answer, and the training."""

import dataclasses
from pathlib import Path

from refine_jax.errors import UserError
from refine_jax.hf.calibration import Calibration
from refine_jax.hf.calibration import read as read_calibration
from refine_jax.hf.config import read_json
from refine_jax.model.transformer import ModelConfig
from refine_jax.text.vocabulary import check_ids

NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Refinement:
  """What a training run leaves under "refinement" in generation_config.json for the sampler.

  Attributes:
    noise_token: what the rounds saw instead of tokens to be drafted.
    block_size: of noise.kind "block"; None: it was trained without blocks.
    random_noise: noise tokens were drawn uniformly from the vocabulary.
    adapter: the folder with a gated adapter, next to generation_config.json; None: there is none.
    base: the model that the adapter belongs to, a path or a hub name; None: this directory.
    base_fingerprint: of the weights of `base` (checkpoint/checksums.py); None: not known.
    calibration: what the probabilities of drafts are worth; None: it was not measured.
  """

  noise_token: int
  block_size: int | None
  random_noise: bool = False
  adapter: str | None = None
  base: str | None = None
  base_fingerprint: str | None = None
  calibration: Calibration | None = None


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """What a model's directory says of generation.

  Attributes:
    eos_token_ids: any of them ends an answer; None where the directory names none.
    pad_token_id: or None.
    refinement: or None.
  """

  eos_token_ids: tuple[int, ...] | None
  pad_token_id: int | None
  refinement: Refinement | None


def read_generation_config(directory: Path, config: ModelConfig) -> GenerationConfig:
  """Reads the special ids and the training's record. Keys not there are looked for in config.json.

  Raises:
    UserError: a value has a wrong type, or an id that ends answers is outside the vocabulary.
  """
  path = directory / NAME
  own = read_json(directory, NAME) if path.exists() else {}
  shared = read_json(directory)

  def lookup(key):
    place = path if own.get(key) is not None else directory / "config.json"
    return (own if place == path else shared).get(key), f"{place}: {key}"

  eos, where = lookup("eos_token_id")
  ids = None if eos is None else token_ids(eos, where)
  check_ids(ids or (), config.vocab_size, where)
  pad, where = lookup("pad_token_id")
  if pad == -1 and type(pad) is int:  # how Llama's first releases say "none"
    pad = None
  if isinstance(pad, list):
    raise UserError(f"{where}={pad!r} must be one id.")
  pad = next(iter(token_ids(pad, where)), None)
  values, where = lookup("refinement")
  refinement = None if values is None else _read_refinement(values, config, where)
  return GenerationConfig(ids, pad, refinement)


def token_ids(value: object, where: str) -> tuple[int, ...]:
  """One id or a list of them as a tuple; null is an empty one.

  Raises:
    UserError: the value is neither; `where` names it.
  """
  ids: list = [] if value is None else value if isinstance(value, list) else [value]
  if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
    raise UserError(f"{where}={value!r} must be a token id, or a list of them.")
  return tuple(ids)


def _read_refinement(values: object, config: ModelConfig, where: str) -> Refinement:
  """From its JSON; keys of a later version are left alone."""
  if not isinstance(values, dict):
    raise UserError(f"{where}={values!r} must be an object; remove it, or export the run again.")
  noise, block = values.get("noise_token"), values.get("block_size")
  if type(noise) is not int or not 0 <= noise < config.vocab_size:
    raise UserError(
      f"{where}.noise_token={noise!r} must be a token id below {config.vocab_size}; export the run"
      " again."
    )
  if block is not None and not (type(block) is int and 1 <= block <= config.max_length):
    raise UserError(
      f"{where}.block_size={block!r} must be null or a number of 1 to {config.max_length}; export"
      " the run again."
    )
  random_noise = values.get("random_noise", False)
  if type(random_noise) is not bool:
    raise UserError(
      f"{where}.random_noise={random_noise!r} must be true or false; export the run again."
    )
  texts = {key: values.get(key) for key in ("adapter", "base", "base_fingerprint")}
  for key, text in texts.items():
    if text is not None and (not isinstance(text, str) or not text):
      raise UserError(f"{where}.{key}={text!r} must be text; export the run again.")
  adapter = texts["adapter"]
  # Any folder above would let the file point out of its directory.
  if adapter is not None and (Path(adapter).name != adapter or adapter == ".."):
    raise UserError(f"{where}.adapter={adapter!r} must name a folder beside {NAME}.")
  calibration = read_calibration(values.get("calibration"), f"{where}.calibration")
  return Refinement(noise, block, random_noise, **texts, calibration=calibration)


def describe_generation(directory: Path, eos: int | None, refinement: dict | None) -> dict:
  """A directory's generation_config.json with what the training adds.

  The tokenizer's EOS ends every response of the training, so it must end generation too.

  Args:
    eos: the tokenizer's, or None.
    refinement: fields of Refinement, or None.

  Raises:
    UserError: what is there is no token id.
  """
  config = read_json(directory, NAME) if (directory / NAME).exists() else {}
  before = dict(config)
  name = NAME if config.get("eos_token_id") is not None else "config.json"
  known = config if name == NAME else read_json(directory)
  known = list(token_ids(known.get("eos_token_id"), f"{directory / name}: eos_token_id"))
  if eos is not None and eos not in known:
    known = [*known, eos]
    config["eos_token_id"] = known if len(known) > 1 else eos
  if refinement:
    config["refinement"] = refinement
  if config != before:
    # transformers may make such a file anew from config.json, and then loses what was added.
    config.pop("_from_model_config", None)
  return config
