"""What `load` can load, each as parameters and their adapter: directories and workdirs."""

import dataclasses
from pathlib import Path

import jax

from refine_jax.checkpoint import checksums
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import peft
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.generation_config import read_generation_config
from refine_jax.hf.shards import all_finite
from refine_jax.model import adapters
from refine_jax.model.config import ModelConfig
from refine_jax.quoting import shown, some
from refine_jax.tree import leaf_name


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """What was found in one place.

  Attributes:
    params: of the model, or of the base where there is an adapter; host arrays as stored.
    directory: with the tokenizer, and what the training left for the sampler.
    adapter: or None.
    step, record: of a workdir: its checkpoint and the JSON that was written with it.
  """

  params: dict
  config: ModelConfig
  directory: Path
  adapter: peft.LoadedAdapter | None = None
  step: int | None = None
  record: dict | None = None


def from_directory(directory: Path) -> Source:
  """A model; a base with a gated adapter next to it or a reference to a base; or a PEFT LoRA.

  Raises:
    UserError: a part is missing, or does not fit the others.
  """
  if (directory / peft.CONFIG).is_file():
    base = peft.find_base(directory)
    config = hf_config.read_model_config(base)
    adapter = peft.read(directory, config, hf_config.read_family(base), kind="lora")
    own = (directory / "config.json").is_file()  # and a tokenizer, as an export has them
    params = hf_weights.load_params(base, config)
    return Source(params, config, directory if own else base, adapter)
  config = hf_config.read_model_config(directory)
  trained = read_generation_config(directory, config).refinement
  if trained is None or trained.adapter is None:
    return Source(hf_weights.load_params(directory, config), config, directory)
  family = hf_config.read_family(directory)
  adapter = peft.read(directory / trained.adapter, config, family, kind="gated")
  base = directory if trained.base is None else peft.beside(directory, trained.base)
  params = hf_weights.load_params(base, config)
  if trained.base is not None and trained.base_fingerprint is not None:
    refuse_other_base(params, trained.base_fingerprint, base)
  return Source(params, config, directory, adapter)


def from_workdir(workdir: Path, step: int | None) -> Source:
  """A run's checkpoint; of a run that trained an adapter, with the base that it started from.

  Args:
    step: default: the newest.

  Raises:
    UserError: no such checkpoint, a value in it is not finite, or the base or the model's
      config.json is another one now.
  """
  # Orbax takes seconds to import, and only workdirs need it.
  from refine_jax.checkpoint import checkpointer

  params, found = checkpointer.restore_params(workdir, step)
  _check_finite(params, f"step {found} of {workdir}")
  directory = workdir / "model"
  config = hf_config.read_model_config(directory)
  record = checkpointer.saved_record(workdir, found)
  _refuse_other_shape(config, record.get("identity"), directory / "config.json")
  shape = adapters.from_json(record["identity"].get("adapter"))
  if shape is None:
    return Source(params, config, directory, step=found, record=record)
  base = hf_weights.find(record["config"]["model"]["pretrained"])
  base_params = hf_weights.load_params(base, config)
  refuse_other_base(base_params, record["identity"]["base"], base)
  adapter = peft.LoadedAdapter(shape, params)
  return Source(base_params, config, directory, adapter, found, record)


def _refuse_other_shape(config: ModelConfig, identity: object, where: Path) -> None:
  """Raises UserError where config.json is not of the model that the checkpoint says it holds."""
  found, there = config.record(), identity if isinstance(identity, dict) else {}
  names = [f.name for f in dataclasses.fields(config) if found.get(f.name) != there.get(f.name)]
  if names:
    name = names[0]
    raise UserError(
      f"{where} is of another model than the run's: {some(names)} differ ({name} is"
      f" {shown(found.get(name))}, and {shown(there.get(name))} in the checkpoint). Write it as it"
      " was; to change it, export the run and change the export's."
    )


def refuse_other_base(params: dict, fingerprint: str, base: Path) -> None:
  """Raises UserError where the base's weights are not those that the adapter was trained on."""
  found = checksums.fingerprint(params)
  if found != fingerprint:
    raise UserError(
      f"{base} holds other weights (fingerprint {found}) than the adapter was trained on"
      f" ({fingerprint}); put the base's original files there."
    )


def _check_finite(params: dict, where: str) -> None:
  for path, array in jax.tree_util.tree_leaves_with_path(params):
    if not all_finite(array):
      raise UserError(
        f"{where}: {leaf_name(path)} holds values that are not finite, so every answer would be"
        " wrong; choose an earlier step."
      )
