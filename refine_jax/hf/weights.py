"""Hugging Face weights in and out: one table of names, read in both directions, strict both ways.

Only safetensors: nothing here runs code that comes with a model.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from refine_jax.errors import UserError
from refine_jax.files import local_path
from refine_jax.hf.config import read_family
from refine_jax.hf.families import Family
from refine_jax.hf.shards import TensorFiles, all_finite
from refine_jax.model.config import ModelConfig
from refine_jax.model.transformer import param_shapes
from refine_jax.quoting import some
from refine_jax.tree import leaf_name

# Constants that old files carry; the model computes them.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def tensor_names(config: ModelConfig, family: Family) -> dict[str, tuple]:
  """Every tensor of a model: theirs -> (ours, layer or None, shape in the file)."""
  import jax

  result = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
    ours = leaf_name(path)
    if ours in family.top_names:
      result[family.top_names[ours]] = (ours, None, leaf.shape)
      continue
    name = family.layer_names[ours.removeprefix("layers/")]
    shape = leaf.shape[1:][::-1] if ours.endswith("kernel") else leaf.shape[1:]
    for layer in range(config.layers):
      result[f"model.layers.{layer}.{name}"] = (ours, layer, shape)
  return result


def load_params(
  directory: str | Path,
  config: ModelConfig,
  *,
  place: Callable[[str, np.ndarray], object] | None = None,
) -> dict:
  """The parameter tree of model.init_params, in the dtype that the files have.

  One leaf is read at a time, so the host never holds the model twice.

  Args:
    place: (our name, stacked host array) -> what to put into the tree, such as a sharded array.

  Raises:
    UserError: not safetensors, truncated, not finite floats, a tensor in two files, or tensors
      missing, unknown or misshapen (the first of each kind and how many more).
  """
  files = TensorFiles(Path(directory))
  family = read_family(directory)
  wanted = tensor_names(config, family)
  _check_tensors(files, wanted, config, family)
  leaves: dict[str, dict] = {}
  for name, (ours, layer, _) in wanted.items():
    leaves.setdefault(ours, {})[layer] = name
  params: dict = {}
  for ours, names in leaves.items():
    if None in names:
      array = files.read(names[None])
    else:
      parts = [files.read(names[layer]) for layer in range(config.layers)]
      array = _stack([x.T if ours.endswith("kernel") else x for x in parts])
    _insert(params, ours, place(ours, array) if place else array)
  return params


def _stack(parts: list[np.ndarray]) -> np.ndarray:
  """One array of all layers, in the smallest dtype that holds each of theirs."""
  import jax.numpy as jnp

  dtype = functools.reduce(jnp.promote_types, {x.dtype for x in parts})
  return np.stack([x.astype(dtype, copy=False) for x in parts])


def _insert(tree, name, value):
  *parents, last = name.split("/")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value


def _check_tensors(
  files: TensorFiles, wanted: dict[str, tuple], config: ModelConfig, family: Family
):
  tied_head, embedding_name = family.top_names["head"], family.top_names["embedding"]
  there = {n for n in files.shapes if not _IGNORED.search(n)}
  if config.tied_head and tied_head in there:
    there.discard(tied_head)
    if embedding_name in there:
      head, embedding = files.read(tied_head), files.read(embedding_name)
      if head.shape != embedding.shape or not np.array_equal(head, embedding):
        raise UserError(
          f"{files.directory}: config.json ties the head to the embedding, but lm_head.weight"
          " differs from it; set tie_word_embeddings to false."
        )
  shapes = {name: files.shapes[name] for name in there}
  refuse_misfits(files.directory, "config.json", shapes, {n: w[2] for n, w in wanted.items()})


def refuse_misfits(directory: Path, config: str, there: dict, wanted: dict) -> None:
  """Compares the tensors of a directory with those that its configuration asks for.

  Args:
    config: the file's name, for the message.
    there, wanted: name -> shape.

  Raises:
    UserError: some are missing, unknown or misshapen: the first of each kind and how many more.
  """
  missing, unknown = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
  shapes = [
    f"{n} has shape {list(there[n])}, not {list(wanted[n])}"
    for n in sorted(wanted.keys() & there.keys())
    if tuple(there[n]) != tuple(wanted[n])
  ]
  count = len(missing) + len(unknown) + len(shapes)
  if count:
    parts = [_named("missing", missing), _named("unknown", unknown), some(shapes)]
    raise UserError(
      f"{directory}: the weights do not fit {config}, {count} problems:"
      f" {'; '.join(filter(None, parts))}.{_renaming(missing, unknown)}"
    )


def _named(kind: str, names: list[str]) -> str:
  """The first of the names, and the folder of modules that all of them are under."""
  prefix = os.path.commonprefix(names).rpartition(".")[0]
  together = f" (all under {prefix})" if prefix and len(names) > 1 else ""
  return f"{kind} {some(names)}{together}" if names else ""


def _renaming(missing: list[str], unknown: list[str]) -> str:
  """What to do where the unknown tensors are the missing ones under a longer or shorter name."""
  if not missing or not unknown:
    return ""
  longest, there = max(missing, key=len), set(unknown)
  for name in unknown:
    if name.endswith(f".{longest}"):
      extra = name.removesuffix(longest)
      if all(extra + m in there for m in missing):
        return f" The files have {extra!r} before each name: save them without it."
    if longest.endswith(f".{name}"):
      lacking = longest.removesuffix(name)
      under = [m for m in missing if m.startswith(lacking)]
      if all(m.removeprefix(lacking) in there for m in under):
        return f" The files lack {lacking!r} before each name: save them with it."
  return ""


def tensors(
  params: dict, config: ModelConfig, family: Family, dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the family's tensors by name, as host arrays [outputs, inputs], one at a time.

  Raises:
    UserError: a value is not finite, or not in `dtype`.
  """
  for name, (ours, layer, _) in sorted(tensor_names(config, family).items()):
    leaf = params
    for part in ours.split("/"):
      leaf = leaf[part]
    array = np.asarray(leaf if layer is None else leaf[layer])
    array = array.T if ours.endswith("kernel") else array
    with np.errstate(over="ignore", invalid="ignore"):  # said below
      array = np.ascontiguousarray(array if dtype is None else array.astype(dtype))
    if not all_finite(array):
      raise UserError(
        f"{name} holds values that are not finite as {array.dtype.name}, so nothing is exported;"
        " choose another step, or bfloat16 where the values are beyond float16."
      )
    yield name, array


def find(name: str, *, weights: bool = True) -> Path:
  """A local directory, or the local copy of a hub repository (fetched if need be).

  Raises:
    UserError: neither.
  """
  directory = local_directory(name)
  if directory is not None:
    return directory
  import huggingface_hub

  patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
  try:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
  except Exception as error:  # of the hub, of HTTP, and of the file system
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise UserError(
      f"{name} is no local directory, and the hub does not give it: {reason}"
    ) from error


def local_directory(name: str) -> Path | None:
  """The directory of that name; None where the name can only be the hub's.

  Raises:
    UserError: it is a file, no possible path, or a path where nothing is.
  """
  path = local_path(name, "model")
  if path.is_dir():
    return path
  if path.exists() or name.startswith((".", "/", "~")):
    raise UserError(f"{name} is not a directory with a model.")
  return None
