"""A release of an adapter, next to its base or a reference to it.

A gated one, with the base at the root or, by reference, without its weights:

    config.json, tokenizer, model.safetensors   the base's own files
    generation_config.json                      "refinement": noise token, block size, "adapter"
    adapter/                                    a PEFT LoRA directory
    custom_generate/                            code for transformers' generate

SGLang's UNO and vLLM's uno take the adapter from such a folder. A "lora" adapter is the PEFT
directory itself, with the run's config.json and tokenizer in it.
"""

import shutil
from pathlib import Path

from refine_jax import files
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import peft, shards
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.export import DTYPES, check_dtype, copy_model_files
from refine_jax.hf.generation_config import NAME
from refine_jax.hf.model_files import add_custom_generate
from refine_jax.hf.rope import both_spellings

FOLDER = "adapter"
# Kind of the adapter -> how its base is written; the first is the default.
BASES = {"gated": ("copy", "reference"), "lora": ("merge", "reference")}


def check_base(kind: str, how: str | None) -> str:
  """How the base is written, or its default.

  Raises:
    UserError: an adapter of this kind is not written so.
  """
  if how is not None and how not in BASES[kind]:
    raise UserError(
      f"--base={how} is not for a run with adapter.kind={kind}; that is {' or '.join(BASES[kind])}."
    )
  return how or BASES[kind][0]


def export_adapter(
  adapter: peft.LoadedAdapter,
  model_files: Path,
  output: str | Path,
  *,
  base: str,
  how: str,
  fingerprint: str,
  dtype: str = "float32",
  card: str = "",
) -> Path:
  """Writes `output`, complete or not at all.

  Args:
    model_files: of the run: config.json, generation_config.json and the tokenizer's files.
    base: the model that the adapter was trained on, a path or a hub name.
    how: "copy" (of a gated adapter) or "reference".
    fingerprint: of the base's weights; kept where they are not written.
    dtype: of the factors.
    card: the text of README.md.

  Raises:
    UserError: output exists and is not empty, or cannot be written; the base is not there.
  """
  output = files.local_path(output, "--output").absolute()
  files.refuse_used(output)
  check_dtype(dtype)
  config, family = hf_config.read_model_config(model_files), hf_config.read_family(model_files)
  gated = adapter.shape.kind == "gated"
  local = hf_weights.local_directory(base)
  name = base if local is None else str(local.absolute())
  with files.new_directory(output) as temporary:
    copy_model_files(model_files, temporary)
    if not _old_spelling_says_all(model_files):
      files.write_json(
        temporary / "config.json", both_spellings(hf_config.read_json(model_files), family)
      )
    if how == "copy":
      _copy_weights(hf_weights.find(base), temporary)
      if local is not None:
        name = ".."  # a path of this machine says nothing to others
    if gated:
      add_custom_generate(temporary)
      place = {} if how == "copy" else {"base": name, "base_fingerprint": fingerprint}
      _tell_sampler(temporary, place)
    folder = temporary / FOLDER if gated else temporary
    folder.mkdir(exist_ok=True)
    peft.write(folder, adapter, config, family, base=name, dtype=DTYPES[dtype])
    (temporary / "README.md").write_text(card, encoding="utf-8")
  return output


def _old_spelling_says_all(model_files: Path) -> bool:
  """Whether config.json is the same model to transformers 4, which reads no `rope_parameters`."""
  values = hf_config.read_json(model_files)
  old = {key: value for key, value in values.items() if key != "rope_parameters"}
  where = str(model_files / "config.json")
  return hf_config.from_hf(old, where) == hf_config.from_hf(values, where)


def _copy_weights(base: Path, output: Path) -> None:
  """The files as they are, bit for bit."""
  paths = list(shards.weight_files(base))
  if (base / shards.INDEX).exists() and paths[0].name != shards.ONE_FILE:
    paths.append(base / shards.INDEX)
  for path in paths:
    shutil.copyfile(path, output / path.name)


def _tell_sampler(output: Path, place: dict) -> None:
  values = hf_config.read_json(output, NAME) if (output / NAME).exists() else {}
  if not isinstance(values.get("refinement"), dict):
    raise UserError(
      f"the run's model/{NAME} does not name the noise token that its adapter was trained with"
      ' ("refinement"); restore that file.'
    )
  refinement = values["refinement"] | {"adapter": FOLDER} | place
  files.write_json(output / NAME, values | {"refinement": refinement})
