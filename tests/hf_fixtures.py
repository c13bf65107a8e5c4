"""Tiny random models of each family, written by transformers, for the tests to read."""

from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

FAMILIES = {
  "llama": (transformers.LlamaConfig, {}),
  "mistral": (transformers.MistralConfig, {"sliding_window": None}),
  "qwen2": (transformers.Qwen2Config, {}),
  "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
  # A scale that is not that of head_dim, and layers that slide, see all, slide.
  "gemma3_text": (
    transformers.Gemma3TextConfig,
    {
      "head_dim": 8,
      "query_pre_attn_scalar": 20,
      "sliding_window": 6,
      "sliding_window_pattern": 2,
    },
  ),
}


def tiny_hf_model(family: str, tmp_path, *, dtype=torch.float32, seed: int = 0, **overrides):
  """A random model with every tensor away from its initial value, saved as safetensors.

  Args:
    family: a key of FAMILIES.
    overrides: keys of the family's config.

  Returns:
    (its directory, the torch model in evaluation mode)
  """
  config_class, own = FAMILIES[family]
  values = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "attn_implementation": "eager",
  }
  config = config_class(**(values | own | overrides))
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # Norms around one and biases off zero, so that leaving one out shows.
      center = 1.0 if "norm" in name else 0.0
      parameter.copy_(center + 0.2 * torch.randn_like(parameter))
  model = model.to(dtype)
  directory = Path(tmp_path) / f"{family}-{seed}"
  model.save_pretrained(directory)
  return directory, model


def random_ids(shape, vocab_size: int = 61, seed: int = 0) -> np.ndarray:
  """Token ids above the special ones."""
  return np.random.default_rng(seed).integers(3, vocab_size, shape).astype(np.int32)


def torch_logits(model, ids) -> np.ndarray:
  """The torch model's float32 logits [B, T, V]."""
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(ids)).long()).logits.float().numpy()


def words_tokenizer():
  """For the vocabulary of 61: words w3, w4, .., and three special tokens."""
  special = {"<unk>": 0, "<eos>": 1, "<pad>": 2}
  vocabulary = special | {f"w{i}": i for i in range(3, 61)}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
  )
