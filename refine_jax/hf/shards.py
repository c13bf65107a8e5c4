"""The safetensors files of a directory as one set of tensors, read one by one.

A model's directory may come from anybody. Only safetensors are opened, only regular files, and an
index names files of its own directory: nothing here runs code, follows a path, or waits on a pipe.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from refine_jax.errors import UserError
from refine_jax.hf.config import read_json
from refine_jax.quoting import reason, some

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# safetensors' names of what a weight can be. F64 becomes F32: JAX computes in no more.
_DTYPES = ("F64", "F32", "F16", "BF16")
_CHUNK = 1 << 16  # values that stay in a core's cache


class TensorFiles:
  """Every tensor of a directory's weights by its name.

  Attributes:
    directory: where the files are.
    shapes: name -> shape.
  """

  def __init__(self, directory: Path, paths: Sequence[Path] | None = None) -> None:
    """Opens the files; no tensor is read.

    Args:
      paths: of the files; default: those of `weight_files`.

    Raises:
      UserError: no weights, a damaged file, a tensor in two files, or one that is no float.
    """
    self.directory = directory
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._files: dict[str, Any] = {}
    self._paths: dict[str, Path] = {}
    for path in weight_files(directory) if paths is None else paths:
      for name, file, shape in _open(path):
        if name in self._paths:
          raise UserError(
            f"{directory}: the tensor {name} is in {self._paths[name].name} and in {path.name};"
            " remove the file that is not meant."
          )
        self._paths[name], self._files[name], self.shapes[name] = path, file, shape

  def read(self, name: str) -> np.ndarray:
    """The tensor on the host.

    Raises:
      UserError: it cannot be read, or a value in it is not finite.
    """
    path = self._paths[name]
    try:
      array = self._files[name].get_tensor(name)
    except Exception as error:  # of three libraries: safetensors, numpy, ml_dtypes
      raise UserError(
        f"{path}: {name} cannot be read ({reason(error)}); fetch the file again."
      ) from error
    if array.dtype == np.float64:
      with np.errstate(over="ignore", invalid="ignore"):  # it is infinite then, which is said below
        array = array.astype(np.float32)
    if not all_finite(array):
      raise UserError(
        f"{path}: {name} holds values that are not finite (NaN or infinity), so every answer would"
        " be wrong; fetch the file again, or take an earlier checkpoint."
      )
    return array


def weight_files(directory: Path) -> Sequence[Path]:
  """The files that hold the weights, by transformers' rule: one file, before an index.

  Without either, all safetensors files together, as a directory that lost its index has them.

  Raises:
    UserError: there is none, or the index names what is not there or not in the directory.
  """
  if os.path.isfile(directory / ONE_FILE):
    return [directory / ONE_FILE]
  if (directory / INDEX).exists():
    return _indexed(directory)
  # Mistral's releases carry the weights once more, under names of its own library.
  paths = sorted(
    p
    for p in directory.glob("*.safetensors")
    if not p.name.startswith("consolidated") and os.path.isfile(p)
  )
  if not paths:
    pickled = list(directory.glob("*.bin")) + list(directory.glob("*.pt"))
    hint = " Its pickled weights are not loaded: save them as safetensors." if pickled else ""
    raise UserError(f"{directory} has no .safetensors file.{hint}")
  return paths


def _indexed(directory: Path) -> list[Path]:
  """The files that the index names, each a regular file of this directory or a link to one."""
  index = directory / INDEX
  weight_map = read_json(directory, INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f"{index} has no weight_map; fetch or write it again.")
  for tensor, name in weight_map.items():
    # Any folder in the name would let the index point out of the directory.
    if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".safetensors":
      raise UserError(
        f"{index} says that {tensor} is in {name!r}; it may name .safetensors files of its own"
        " directory only. Fetch or write it again."
      )
  names = sorted(set(weight_map.values()))
  missing = [n for n in names if not os.path.isfile(directory / n)]
  if missing:
    raise UserError(f"{directory} lacks {some(missing)}, which its index names.")
  return [directory / n for n in names]


def _open(path: Path):
  """(name, open file, shape) of each tensor."""
  found = []
  try:
    file = safetensors.safe_open(path, "numpy")
    for name in file.keys():
      header = file.get_slice(name)
      found.append((name, file, tuple(header.get_shape()), header.get_dtype()))
  except Exception as error:  # the library raises many kinds for a damaged header
    raise UserError(
      f"{path} is damaged or cut short ({reason(error)}); fetch or write it again."
    ) from error
  bad = [f"{name} ({dtype})" for name, _, _, dtype in found if dtype not in _DTYPES]
  if bad:
    raise UserError(
      f"{path}: weights are float32, float16 or bfloat16, and these are not: {some(bad)}; take a"
      " release that is not quantized."
    )
  return [(name, file, shape) for name, file, shape, _ in found]


def all_finite(array: np.ndarray) -> bool:
  """Whether no value is NaN or infinite; the bits are looked at, which is fast in any float."""
  bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(-1)
  sign = bits.dtype.type(1 << (8 * array.dtype.itemsize - 1))
  infinity = np.asarray(np.inf, array.dtype).view(bits.dtype)[()]
  return all((bits[i : i + _CHUNK] & ~sign).max() < infinity for i in range(0, bits.size, _CHUNK))
