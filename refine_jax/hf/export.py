"""A release directory that transformers and others load: weights, configs, tokenizer, card."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from refine_jax import files, records
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import weights as hf_weights

DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SHARD_BYTES = 5 * 10**9


def export(
  params: dict,
  model_files,
  output,
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
  if dtype not in DTYPES:
    raise UserError(f"--dtype={dtype} is not known; it is one of {', '.join(DTYPES)}.")
  model_files = Path(model_files)
  config = hf_config.read_json(model_files)
  shape = hf_config.from_hf(config, str(model_files / "config.json"))
  try:
    with files.new_directory(output) as temporary:
      for path in model_files.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
          shutil.copyfile(path, temporary / path.name)
      files.write_json(temporary / "config.json", _both_spellings(config, dtype))
      _write_weights(temporary, hf_weights.tensors(params, shape, DTYPES[dtype]), shard_bytes)
      (temporary / "README.md").write_text(card, encoding="utf-8")
  except safetensors.SafetensorError as error:
    raise UserError(
      f"{output} could not be written ({error}); {files.free_space(output)}."
    ) from error
  return output


def export_step(workdir, step: int, params, *, dtype: str = "bfloat16") -> Path | None:
  """WORKDIR/global_step_N/huggingface, where users of the PyTorch original look for it.

  Returns:
    the directory; None in processes other than the first, which take part in gathering only.
  """
  import jax
  from jax.experimental import multihost_utils

  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  output = Path(workdir) / f"global_step_{step}" / "huggingface"
  if jax.process_index() != 0 or output.exists():
    return output
  return export(
    params, Path(workdir) / "model", output, dtype=dtype, card=model_card(workdir, step)
  )


def _both_spellings(config: dict, dtype: str) -> dict:
  """The config with its dtype and rope in the words of transformers 4 and of 5."""
  config = config | {"dtype": dtype, "torch_dtype": dtype}
  rope = dict(config.get("rope_parameters") or {})
  if rope:
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    scaled = rope.get("rope_type", "default") != "default"
    config |= {"rope_theta": theta, "rope_scaling": rope if scaled else None}
  else:
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    config |= {"rope_parameters": scaling | {"rope_theta": config.get("rope_theta", 10000.0)}}
  return config


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


def model_card(workdir, step: int) -> str:
  """README.md of a release: what it is, how to use it, the run's metrics and config."""
  workdir = Path(workdir)
  config = hf_config.read_json(workdir)
  base = config["model"]["pretrained"]
  front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
  front += ["tags:", "- refine_jax", "- parallel-decoding"]
  # A local path says nothing to others, and the hub's form is owner/name.
  if base and not Path(base).expanduser().exists() and base.count("/") == 1:
    front.append(f"base_model: {base}")
  rounds = config["objective"]["num_iterations"]
  lines = [
    *front,
    "---",
    "",
    f"# {workdir.name}, step {step}",
    "",
    f"An ordinary causal language model{f', fine-tuned from {base},' if base else ''} trained"
    " with [refine_jax] to fill a whole block of tokens in a few parallel passes."
    " Its architecture is unchanged: everything that loads its base loads it.",
    "",
    f"Training: {rounds} refinement rounds with loss weights"
    f" {config['objective']['loss_weights']}, noise rate uniform in"
    f" [{config['noise']['noise_min']}, {config['noise']['noise_max']}].",
    "",
    "```python",
    "import refine_jax",
    "",
    'model = refine_jax.load("THIS_DIRECTORY")',
    'out = refine_jax.generate(model, ["..."], block_size=8, mode="exact")',
    "print(out.texts[0], out.tokens_per_pass)",
    "```",
    "",
    "`exact` gives the text of greedy autoregressive decoding, in fewer passes. With transformers:",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
    "```",
    "",
    *_metric_lines(workdir / records.NAME, step),
    "## Configuration",
    "",
    "```json",
    json.dumps(config, indent=2),
    "```",
    "",
  ]
  return "\n".join(lines)


def _metric_lines(path: Path, step: int) -> list[str]:
  """The newest training and validation numbers up to the step, as a table."""
  newest: dict = {}
  for record in records.read(path):
    if record["step"] <= step:
      newest |= {k: v for k, v in record.items() if k != "step" and v is not None}
  names = [n for n in sorted(newest) if n.removeprefix("eval/").startswith(("loss_", "accuracy_"))]
  if not names:
    return []
  return [
    "## Metrics",
    "",
    "| metric | value |",
    "| --- | --- |",
    *(f"| {name} | {newest[name]:.4f} |" for name in names),
    "",
  ]
