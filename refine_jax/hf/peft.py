"""An adapter as a PEFT LoRA directory: adapter_config.json and adapter_model.safetensors.

PEFT (github.com/huggingface/peft) names a factor after the module it stands next to, and keeps it
transposed: lora_A.weight [rank, inputs], lora_B.weight [outputs, rank]. Reading is strict: a key of
the configuration that would change the computation stops the program by name.
"""

import dataclasses
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from refine_jax import files
from refine_jax.errors import UserError
from refine_jax.hf.config import read_json
from refine_jax.hf.families import Family
from refine_jax.hf.shards import TensorFiles, all_finite
from refine_jax.hf.values import count, number
from refine_jax.hf.weights import find, refuse_misfits
from refine_jax.model.adapters import PROJECTIONS, Adapter
from refine_jax.model.config import ModelConfig
from refine_jax.model.transformer import param_shapes
from refine_jax.quoting import shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The weights' metadata say under this name which kind the adapter is, which PEFT does not know of.
_KIND = "refine_jax_kind"
# Keys that are read, or that change nothing in a forward pass.
_KNOWN = frozenset(
  "r lora_alpha target_modules base_model_name_or_path auto_mapping inference_mode lora_dropout"
  " megatron_core peft_version qalora_group_size".split()
)
# Keys that could change the computation -> the values that do not. Of all others null, false and
# what is empty.
_ONLY = {
  "peft_type": ("LORA",),
  "task_type": ("CAUSAL_LM",),
  "bias": ("none",),
  # Other names stand for methods that change the base as well.
  "init_lora_weights": (True, False, "gaussian", "orthogonal"),
  "revision": ("main",),
}
_MOST_RANK, _ALPHAS = 2**14, (1e-6, 1e9)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedAdapter:
  """An adapter with its numbers.

  Attributes:
    shape: its kind, rank, scale and projections.
    factors: adapters.init_params' tree, float32.
  """

  shape: Adapter
  factors: dict


def write(
  directory: Path,
  adapter: LoadedAdapter,
  config: ModelConfig,
  family: Family,
  *,
  base: str,
  dtype: DTypeLike = np.float32,
) -> None:
  """Writes both files into a directory that is there.

  Args:
    base: a path or a hub name, as base_model_name_or_path.
    dtype: of the factors.

  Raises:
    UserError: they cannot be written, or a factor is not finite.
  """
  shape = adapter.shape
  tensors = {}
  for name, (module, projection, factor, layer, _) in _tensor_names(shape, config, family).items():
    array = np.asarray(adapter.factors["layers"][module][projection][factor][layer])
    with np.errstate(over="ignore", invalid="ignore"):  # said below
      tensors[name] = np.ascontiguousarray(array.T.astype(dtype))
    if not all_finite(tensors[name]):
      raise UserError(
        f"{name} holds values that are not finite as {tensors[name].dtype.name}, so nothing is"
        " exported; choose another step."
      )
  values = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": shape.rank,
    "lora_alpha": int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha,
    "target_modules": [_module(name, family).rpartition(".")[2] for name in shape.projections],
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "modules_to_save": None,
  }
  # "pt" is what PEFT looks for; nothing here is of torch.
  metadata = {"format": "pt", _KIND: shape.kind}
  with files.new_file(directory / WEIGHTS) as temporary:
    safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
  # Last: it is what tells a reader that there is an adapter.
  files.write_json(directory / CONFIG, values)


def read(directory: Path, config: ModelConfig, family: Family, *, kind: str) -> LoadedAdapter:
  """Reads an adapter of a model of this shape.

  Args:
    kind: "gated" or "lora".

  Raises:
    UserError: something that this library does not compute, tensors that are missing, unknown,
      misshapen or not finite, pickled weights, or a gated adapter where a "lora" one is asked for.
  """
  where = str(directory / CONFIG)
  values = read_json(directory, CONFIG)
  _refuse_unknown(values, where)
  rank = count(values, "r", where, most=_MOST_RANK)
  alpha = number(values.get("lora_alpha"), "lora_alpha", where, *_ALPHAS)
  if not (directory / WEIGHTS).is_file():
    raise UserError(
      f"{directory} has no {WEIGHTS}; weights that are pickled (adapter_model.bin) are not loaded:"
      " save them as safetensors."
    )
  tensors = TensorFiles(directory, [directory / WEIGHTS])
  if kind == "lora" and _written_kind(directory / WEIGHTS) == "gated":
    raise UserError(
      f"{directory} holds a gated adapter, which belongs on noise tokens alone; load the directory"
      " that it was exported in."
    )
  projections = _projections(values.get("target_modules"), tensors.shapes, family, where)
  shape = Adapter(kind=kind, rank=rank, alpha=alpha, projections=projections)
  names = _tensor_names(shape, config, family)
  refuse_misfits(directory, CONFIG, tensors.shapes, {n: entry[-1] for n, entry in names.items()})
  layers: dict = {}
  for name, (module, projection, factor, _, _) in names.items():  # layers in order
    factors = layers.setdefault(module, {}).setdefault(projection, {})
    factors.setdefault(factor, []).append(tensors.read(name).T.astype(np.float32))
  stacked = {
    module: {
      projection: {factor: np.stack(parts) for factor, parts in factors.items()}
      for projection, factors in projections.items()
    }
    for module, projections in layers.items()
  }
  return LoadedAdapter(shape, {"layers": stacked})


def find_base(directory: Path) -> Path:
  """The directory of the model that a PEFT directory belongs to, fetched from the hub if need be.

  A relative path counts from the PEFT directory if something is there, else from the working
  directory, as PEFT has it.

  Raises:
    UserError: it names none, or it is not there.
  """
  base = read_json(directory, CONFIG).get("base_model_name_or_path")
  if not isinstance(base, str) or not base:
    raise UserError(
      f"{directory / CONFIG}: base_model_name_or_path={shown(base)} names no model; write the path"
      " or the hub name of the base there."
    )
  return beside(directory, base)


def beside(directory: Path, name: str) -> Path:
  """The directory of a model that a file in `directory` names: a path from there, or `find`'s."""
  near = directory / files.local_path(name, "model")
  return near if near.is_dir() else find(name)


def _tensor_names(shape: Adapter, config: ModelConfig, family: Family) -> dict[str, tuple]:
  """PEFT's name -> (module, projection, "a" or "b", layer, shape in the file)."""
  kernels = param_shapes(config)["layers"]
  result = {}
  for projection in shape.projections:
    module = PROJECTIONS[projection]
    layers, inputs, outputs = kernels[module][projection]["kernel"].shape
    theirs = _module(projection, family)
    for layer in range(layers):
      prefix = f"base_model.model.model.layers.{layer}.{theirs}"
      result[f"{prefix}.lora_A.weight"] = (module, projection, "a", layer, (shape.rank, inputs))
      result[f"{prefix}.lora_B.weight"] = (module, projection, "b", layer, (outputs, shape.rank))
  return result


def _module(projection: str, family: Family) -> str:
  """The family's name of a projection under model.layers.N."""
  kernel = family.layer_names[f"{PROJECTIONS[projection]}/{projection}/kernel"]
  return kernel.removesuffix(".weight")


def _refuse_unknown(values: dict, where: str) -> None:
  for key, value in values.items():
    if key in _KNOWN or value is None or value in ({}, []):
      continue
    allowed = _ONLY.get(key, (False,))
    # 1 == True, and neither stands for the other here.
    if not any(value == a and type(value) is type(a) for a in allowed):
      raise UserError(
        f"{where}: {key}={shown(value)} is not supported: only plain LoRA of the projections is;"
        " merge the adapter into its base with peft (merge_and_unload), and load the result."
      )


def _written_kind(path: Path) -> str | None:
  with safetensors.safe_open(path, "numpy") as file:
    return (file.metadata() or {}).get(_KIND)


def _projections(targets: object, there: dict, family: Family, where: str) -> tuple[str, ...]:
  """The projections that target_modules lists; where it is a pattern, those that have a tensor."""
  modules = {name: _module(name, family) for name in PROJECTIONS}
  if isinstance(targets, str):
    found = {n for n, m in modules.items() if any(f".{m}.lora_A." in tensor for tensor in there)}
  elif isinstance(targets, list) and all(isinstance(t, str) for t in targets):
    found = set()
    for target in targets:
      hit = {n for n, m in modules.items() if m == target or m.endswith(f".{target}")}
      if not hit:
        raise UserError(
          f"{where}: target_modules has {shown(target)}, which is no projection of all layers;"
          f" those are {', '.join(m.rpartition('.')[2] for m in modules.values())}."
        )
      found |= hit
  else:
    raise UserError(f"{where}: target_modules={shown(targets)} must be a list of names.")
  if not found:
    raise UserError(f"{where}: target_modules={shown(targets)} names no projection.")
  return tuple(name for name in PROJECTIONS if name in found)
