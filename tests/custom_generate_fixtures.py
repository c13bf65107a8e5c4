"""Exports of tiny models with their PyTorch code, and arguments of generate for them."""

import json
import sys

import hf_fixtures
import pytest
import torch
import transformers

from refine_jax.hf.model_files import add_custom_generate

NOISE, BLOCK, NEW, EOS, PAD = 7, 4, 14, (1, 5), 2
_SLIDES = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6}
CASES = {
  "llama": ("llama", {}),
  "mistral": ("mistral", {}),
  "mistral-sliding": ("mistral", {"sliding_window": 6}),
  "qwen2": ("qwen2", {}),
  "qwen2-sliding": ("qwen2", _SLIDES),
  "qwen3": ("qwen3", {}),
  "gemma3": ("gemma3_text", {}),
}


def alone(tmp_path_factory):
  """Has one thread, which tiny models want, and leaves no code in the user's cache."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  with pytest.MonkeyPatch.context() as patch:
    modules = str(tmp_path_factory.mktemp("modules"))
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    yield
  torch.set_num_threads(threads)
  sys.path[:] = [p for p in sys.path if p != modules]
  # The package knows the folder that it was first found in, and the next file has another.
  for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
    del sys.modules[name]


def complete(directory, **refinement):
  """Adds to a model what an export has for custom_generate; gives (directory, model)."""
  add_custom_generate(directory)
  refinement = {"noise_token": NOISE, "block_size": BLOCK} | refinement
  values = {"eos_token_id": 1, "pad_token_id": PAD, "refinement": refinement}
  (directory / "generation_config.json").write_text(json.dumps(values))
  return directory, transformers.AutoModelForCausalLM.from_pretrained(directory)


def make(place, case):
  """A directory as a run with blocks leaves it, and its model."""
  family, changes = CASES[case]
  return complete(hf_fixtures.tiny_hf_model(family, place, **changes)[0])


def inputs(prompts, **options):
  """Arguments of generate for prompts of unequal lengths."""
  width = max(map(len, prompts))
  ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
  fixed = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": list(EOS)}
  return fixed | {"input_ids": ids, "attention_mask": mask, "pad_token_id": PAD} | options


def ours(model, directory, arguments, **options):
  """generate with the code of the directory."""
  code = {"custom_generate": str(directory), "trust_remote_code": True}
  return model.generate(**arguments, **code, **options)


def new_tokens(sequences, arguments):
  return sequences[:, arguments["input_ids"].shape[1] :].tolist()


def until_eos(row):
  return row[: row.index(EOS[0]) + 1] if EOS[0] in row else row
