"""A release that transformers and others load: weights, configs, tokenizer, code, card."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from refine_jax import files
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.families import family_of
from refine_jax.hf.model_files import TEMPLATE_FOLDER, add_custom_generate
from refine_jax.hf.rope import both_spellings
from refine_jax.quoting import reason

DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SHARD_BYTES = 5 * 10**9


def export(
  params: dict,
  model_files: str | Path,
  output: str | Path,
  *,
  dtype: str = "bfloat16",
  card: str = "",
  shard_bytes: int = _SHARD_BYTES,
) -> Path:
  """Writes `output`, complete or not at all.

  Args:
    params: model.init_params' tree, arrays of any kind.
    model_files: a directory with config.json and the tokenizer's files, which are copied.
    dtype: of the weights, one of DTYPES.
    card: the text of README.md.
    shard_bytes: most tensor bytes in a file.

  Raises:
    UserError: output exists and is not empty, or cannot be written.
  """
  output = files.local_path(output, "--output").absolute()
  files.refuse_used(output)
  check_dtype(dtype)
  model_files = Path(model_files)
  config = hf_config.read_json(model_files)
  shape = hf_config.from_hf(config, str(model_files / "config.json"))
  family = family_of(config)
  try:
    with files.new_directory(output) as temporary:
      copy_model_files(model_files, temporary)
      add_custom_generate(temporary)
      written = both_spellings(config, family) | {"dtype": dtype, "torch_dtype": dtype}
      files.write_json(temporary / "config.json", written)
      tensors = hf_weights.tensors(params, shape, family, DTYPES[dtype])
      _write_weights(temporary, tensors, shard_bytes)
      (temporary / "README.md").write_text(card, encoding="utf-8")
  except safetensors.SafetensorError as error:
    raise UserError(
      f"{output} could not be written ({reason(error)}); {files.free_space(output)}."
    ) from error
  return output


def copy_model_files(model_files: Path, output: Path) -> None:
  """Copies what a model needs besides weights into a directory that is there."""
  for path in model_files.iterdir():
    if path.is_file() and not _is_weights(path.name):
      shutil.copyfile(path, output / path.name)
  if (model_files / TEMPLATE_FOLDER).is_dir():
    shutil.copytree(model_files / TEMPLATE_FOLDER, output / TEMPLATE_FOLDER)


def check_dtype(dtype: str) -> None:
  """Raises UserError for a dtype that weights are not written in."""
  if dtype not in DTYPES:
    raise UserError(f"--dtype={dtype} is not known; it is one of {', '.join(DTYPES)}.")


def _is_weights(name: str) -> bool:
  """Whether a file holds weights or lists files that do: an export has its own."""
  return name.endswith((".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf"))


def _write_weights(directory: Path, tensors: Iterator, shard_bytes: int):
  """One model.safetensors, or numbered shards with an index where they are more than one."""
  shards, total = [], 0
  shard, size = {}, 0

  def flush():
    path = directory / f"shard-{len(shards)}.safetensors"
    # "pt" is what transformers looks for; nothing here is of torch.
    safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
    shards.append((path, list(shard)))

  for name, array in tensors:
    if shard and size + array.nbytes > shard_bytes:
      flush()
      shard, size = {}, 0
    shard[name] = array
    size += array.nbytes
    total += array.nbytes
  flush()
  if len(shards) == 1:
    shards[0][0].rename(directory / "model.safetensors")
    return
  weight_map = {}
  for i, (path, names) in enumerate(shards, 1):
    final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    path.rename(directory / final)
    weight_map |= dict.fromkeys(names, final)
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
  files.write_json(directory / "model.safetensors.index.json", index)
