"""Hugging Face weights in and out: one table of names, read in both directions, strict both ways.

Only safetensors: nothing here runs code that comes with a model.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors

from refine_jax import files
from refine_jax.errors import UserError
from refine_jax.hf.config import read_json
from refine_jax.model.transformer import ModelConfig, param_shapes
from refine_jax.tree import leaf_name

# Ours (under "layers/", where the leading axis is the layer) -> theirs (under model.layers.N.).
# Matrices are transposed: theirs are [outputs, inputs].
_LAYER_NAMES = {
  "attention_norm/scale": "input_layernorm.weight",
  "mlp_norm/scale": "post_attention_layernorm.weight",
  "attention/query_norm/scale": "self_attn.q_norm.weight",
  "attention/key_norm/scale": "self_attn.k_norm.weight",
} | {
  f"{ours}/{kind}": f"{theirs}.{'weight' if kind == 'kernel' else 'bias'}"
  for kind in ("kernel", "bias")
  for ours, theirs in {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
  }.items()
}
_TOP_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "head": "lm_head.weight",
}
# Constants that old files carry; the model computes them.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_TIED_HEAD = _TOP_NAMES["head"]

_MODEL_FILES = ("config.json", "generation_config.json")


def tensor_names(config: ModelConfig) -> dict[str, tuple]:
  """Every tensor of a model: theirs -> (ours, layer or None, shape in the file)."""
  import jax

  result = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
    ours = leaf_name(path)
    if ours in _TOP_NAMES:
      result[_TOP_NAMES[ours]] = (ours, None, leaf.shape)
      continue
    name = _LAYER_NAMES[ours.removeprefix("layers/")]
    shape = leaf.shape[1:][::-1] if ours.endswith("kernel") else leaf.shape[1:]
    for layer in range(config.layers):
      result[f"model.layers.{layer}.{name}"] = (ours, layer, shape)
  return result


def load_params(
  directory,
  config: ModelConfig,
  *,
  place: Callable[[str, np.ndarray], object] | None = None,
) -> dict:
  """The parameter tree of model.init_params, in the dtype that the files have.

  One leaf is read at a time, so the host never holds the model twice.

  Args:
    place: (our name, stacked host array) -> what to put into the tree, such as a sharded array.

  Raises:
    UserError: not safetensors, truncated, or tensors missing, unknown or misshapen (all listed).
  """
  files = _TensorFiles(Path(directory))
  wanted = tensor_names(config)
  _check_tensors(files, wanted, config)
  leaves: dict[str, dict] = {}
  for name, (ours, layer, _) in wanted.items():
    leaves.setdefault(ours, {})[layer] = name
  params: dict = {}
  for ours, names in leaves.items():
    if None in names:
      array = files.read(names[None])
    else:
      parts = [files.read(names[layer]) for layer in range(config.layers)]
      array = np.stack([x.T if ours.endswith("kernel") else x for x in parts])
    _insert(params, ours, place(ours, array) if place else array)
  return params


def _insert(tree, name, value):
  *parents, last = name.split("/")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value


def _check_tensors(files, wanted, config):
  there = {n for n in files.shapes if not _IGNORED.search(n)}
  if config.tied_head and _TIED_HEAD in there:
    there.discard(_TIED_HEAD)
    head, embedding = files.read(_TIED_HEAD), files.read(_TOP_NAMES["embedding"])
    if head.shape != embedding.shape or not np.array_equal(head, embedding):
      raise UserError(
        f"{files.directory}: config.json ties the head to the embedding, but lm_head.weight"
        " differs from it; set tie_word_embeddings to false."
      )
  problems = [f"missing {n}" for n in sorted(wanted.keys() - there)]
  problems += [f"unknown {n}" for n in sorted(there - wanted.keys())]
  problems += [
    f"{n} has shape {list(files.shapes[n])}, not {list(wanted[n][2])}"
    for n in sorted(wanted.keys() & there)
    if tuple(files.shapes[n]) != tuple(wanted[n][2])
  ]
  if problems:
    raise UserError(
      f"{files.directory}: the weights do not fit config.json, {len(problems)} problems:"
      f" {'; '.join(problems)}."
    )


class _TensorFiles:
  """The safetensors files of a directory as one set of tensors, read one by one."""

  def __init__(self, directory: Path):
    self.directory = directory
    # Mistral's releases carry the weights once more, under names of its own library.
    paths = sorted(p for p in directory.glob("*.safetensors") if p.name[:12] != "consolidated")
    index = directory / "model.safetensors.index.json"
    if index.exists():
      weight_map = read_json(directory, index.name).get("weight_map")
      if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map; fetch or write it again.")
      names = set(weight_map.values())
      missing = sorted(n for n in names if not (directory / n).exists())
      if missing:
        raise UserError(f"{directory} lacks {', '.join(missing)}, which its index names.")
      paths = [directory / n for n in sorted(names)]
    if not paths:
      pickled = list(directory.glob("*.bin")) + list(directory.glob("*.pt"))
      hint = " Its pickled weights are not loaded: save them as safetensors." if pickled else ""
      raise UserError(f"{directory} has no .safetensors file.{hint}")
    self._files = {}
    self.shapes = {}
    for path in paths:
      try:
        file = safetensors.safe_open(path, "numpy")
        for name in file.keys():
          self._files[name] = file
          self.shapes[name] = tuple(file.get_slice(name).get_shape())
      except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
          f"{path} is damaged or cut short ({error}); fetch or write it again."
        ) from error

  def read(self, name: str) -> np.ndarray:
    return self._files[name].get_tensor(name)


def tensors(params: dict, config: ModelConfig, dtype=None) -> Iterator[tuple[str, np.ndarray]]:
  """Their tensors in the order of their names, as host arrays [outputs, inputs], one by one."""
  for name, (ours, layer, _) in sorted(tensor_names(config).items()):
    leaf = params
    for part in ours.split("/"):
      leaf = leaf[part]
    array = np.asarray(leaf if layer is None else leaf[layer])
    array = array.T if ours.endswith("kernel") else array
    yield name, np.ascontiguousarray(array if dtype is None else array.astype(dtype))


def find(name: str, *, weights: bool = True) -> Path:
  """A local directory, or the local copy of a hub repository (fetched if need be).

  Raises:
    UserError: neither.
  """
  path = Path(name).expanduser()
  if path.is_dir():
    return path
  if path.exists() or name.startswith((".", "/", "~")):
    raise UserError(f"{name} is not a directory with a model.")
  import huggingface_hub
  from huggingface_hub import errors

  patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
  try:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
  except (
    errors.HfHubHTTPError,
    errors.HFValidationError,
    errors.LocalEntryNotFoundError,
    OSError,
  ) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f"{name} is no local directory, and the hub does not give it: {reason}"
    ) from error


def load_tokenizer(name, *, trust_remote_code: bool = False):
  """The tokenizer of a directory or hub name.

  Raises:
    UserError: there is none.
  """
  # It advises to install PyTorch, which nothing here needs.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  if str(name).startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
    raise UserError(f"{name} (the tokenizer) is not a directory.")
  try:
    return transformers.AutoTokenizer.from_pretrained(
      str(name), trust_remote_code=trust_remote_code
    )
  except (OSError, ValueError, KeyError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{name} has no tokenizer that can be loaded: {reason}") from error


def save_model_files(
  directory, tokenizer, output: Path, *, chat_template: str = "", refinement: dict | None = None
):
  """What an export needs beside weights: config.json, generation_config.json, the tokenizer.

  Written beside `output` and renamed; an `output` that is there already is left as it is.

  Args:
    chat_template: for a tokenizer that has none: what it was trained with is what it is used with.
    refinement: what the sampler should know of the training (loading.Refinement), under this name
      in generation_config.json.
  """
  if output.exists():
    return
  with files.new_directory(output) as temporary:
    for name in _MODEL_FILES:
      if (Path(directory) / name).exists():
        shutil.copyfile(Path(directory) / name, temporary / name)
    if tokenizer is not None:
      if chat_template and not tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template
      tokenizer.save_pretrained(temporary)
      _describe_generation(temporary, tokenizer.eos_token_id, refinement)


def _describe_generation(directory: Path, eos: int | None, refinement: dict | None):
  """The tokenizer's EOS ends every response of the training, so it must end generation too."""
  path = directory / "generation_config.json"
  config = read_json(directory, path.name) if path.exists() else {}
  before = dict(config)
  known = config.get("eos_token_id", read_json(directory).get("eos_token_id"))
  known = [] if known is None else known if isinstance(known, list) else [known]
  if eos is not None and eos not in known:
    known = [*known, eos]
    config["eos_token_id"] = known if len(known) > 1 else eos
  if refinement:
    config["refinement"] = refinement
  if config != before:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
