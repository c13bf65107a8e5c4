"""Hugging Face's config.json -> ModelConfig, with every key accounted for.

A key is read, or known not to change what the model computes, or it stops the program by name.
Both spellings are understood: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
transformers 5 (`rope_parameters`, `dtype`).
"""

import json
from pathlib import Path

from refine_jax.errors import UserError
from refine_jax.hf.rope import number, read_rope
from refine_jax.model.transformer import ModelConfig

# model_type -> the one architecture, and what transformers assumes where a key is absent.
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
_QWEN_DEFAULTS = {
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "sliding_window": 4096,
  "use_sliding_window": False,
  "max_window_layers": 28,
}
_DEFAULTS = {
  "llama": {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
  "mistral": {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
  },
  "qwen2": _QWEN_DEFAULTS,
  "qwen3": _QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
}

_READ = frozenset(
  "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers"
  " num_attention_heads num_key_value_heads head_dim rms_norm_eps initializer_range"
  " tie_word_embeddings max_position_embeddings original_max_position_embeddings rope_theta"
  " rope_scaling rope_parameters sliding_window use_sliding_window max_window_layers layer_types"
  " attention_bias mlp_bias".split()
)
# Bookkeeping, special tokens and defaults of generation.
_HARMLESS = frozenset(
  "_name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset"
  " attn_implementation _flash_attn_2_enabled torch_dtype dtype use_bfloat16 transformers_version"
  " transformers.js_config is_llama_config unsloth_fixed unsloth_version use_cache torchscript"
  " pretraining_tp chunk_size_feed_forward is_decoder output_attentions output_hidden_states"
  " return_dict tie_last_hidden_states id2label label2id num_labels problem_type finetuning_task"
  " task_specific_params tokenizer_class prefix tf_legacy_loss tie_encoder_decoder"
  " max_sequence_length model_max_length bos_token_id eos_token_id pad_token_id sep_token_id"
  " decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens"
  " begin_suppress_tokens bad_words_ids max_length min_length max_new_tokens do_sample"
  " early_stopping num_beams num_beam_groups num_return_sequences diversity_penalty temperature"
  " top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size"
  " encoder_no_repeat_ngram_size exponential_decay_length_penalty remove_invalid_values"
  " output_scores return_dict_in_generate renormalize_logits".split()
)
# Elsewhere null means what absence does.
_NULL_IS_A_VALUE = ("sliding_window", "head_dim", "num_key_value_heads")
# Keys that would change the computation, and the values that do not. null is always one.
_ONLY = {
  "hidden_act": ("silu", "swish"),
  "attention_dropout": (0,),
  "partial_rotary_factor": (1,),
  "rope_interleaved": (False,),
  "use_mrope": (False,),
  "is_encoder_decoder": (False,),
  "add_cross_attention": (False,),
  "cross_attention_hidden_size": (),
  "pruned_heads": ({},),
  "per_layer_config": ({},),
  "quantization_config": (),
  "auto_map": (),
}
# The same where a family's code in transformers has it fixed.
_ONLY_IN = {
  "llama": {"sliding_window": (), "use_sliding_window": (False,)},
  "mistral": {"attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (True,)},
  "qwen2": {"attention_bias": (True,), "mlp_bias": (False,)},
  "qwen3": {"mlp_bias": (False,)},
}


def read_json(directory, name: str = "config.json") -> dict:
  """A JSON object from a file of a model's directory.

  Raises:
    UserError: no such file, or not a JSON object.
  """
  path = Path(directory) / name
  if path.exists() and not path.is_file():  # reading a pipe or a device would never end
    raise UserError(f"{path} is not a file; give a Hugging Face model directory.")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path} does not exist; give a Hugging Face model directory.") from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON ({error}); copy it anew.") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}.")
  return value


def read_model_config(directory) -> ModelConfig:
  """The shape of the model in a Hugging Face directory.

  Raises:
    UserError: config.json is missing, damaged, or asks for what is not supported.
  """
  return from_hf(read_json(directory), str(Path(directory) / "config.json"))


def from_hf(values: dict, where: str = "config.json") -> ModelConfig:
  """The same from config.json's content; `where` names it in messages.

  Raises:
    UserError: naming the key that is missing, malformed, or not supported.
  """
  family = _check_family(values, where)
  _check_keys(values, family, where)
  given = {k: v for k, v in values.items() if v is not None or k in _NULL_IS_A_VALUE}
  c = {"rms_norm_eps": 1e-6, "initializer_range": 0.02} | _DEFAULTS[family] | given
  count = lambda key: _count(c, key, where)  # noqa: E731  said eight times below
  layers, heads, width = (
    count("num_hidden_layers"),
    count("num_attention_heads"),
    count("hidden_size"),
  )
  kv_heads = heads if c.get("num_key_value_heads") is None else count("num_key_value_heads")
  if heads % kv_heads:
    raise UserError(
      f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
    )
  if c.get("head_dim") is None and width % heads:
    raise UserError(
      f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads};"
      " set head_dim."
    )
  head_dim = width // heads if c.get("head_dim") is None else count("head_dim")
  if head_dim % 2:
    raise UserError(f"{where}: head_dim={head_dim} is odd; rotary embeddings need an even one.")
  max_length = count("max_position_embeddings")
  rope = read_rope(c, max_length, where)
  if rope.kind == "yarn":  # Qwen's instructions add YaRN and leave max_position_embeddings alone.
    max_length = max(max_length, int(rope.factor * rope.original_length))
  bias = _flag(c, "attention_bias", where)
  return ModelConfig(
    vocab_size=count("vocab_size"),
    width=width,
    feed_forward=count("intermediate_size"),
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    norm_eps=number(c["rms_norm_eps"], "rms_norm_eps", where),
    rope=rope,
    tied_head=_flag(c, "tie_word_embeddings", where),
    qkv_bias=bias or family == "qwen2",
    output_bias=bias and family != "qwen2",
    mlp_bias=_flag(c, "mlp_bias", where),
    qk_norm=family == "qwen3",
    windows=_windows(c, family, layers, where),
    max_length=max_length,
    initializer_range=number(c["initializer_range"], "initializer_range", where),
  )


def _check_family(values, where):
  family = values.get("model_type")
  if family not in ARCHITECTURES:
    raise UserError(
      f"{where}: model_type={family!r} is not supported; supported are {', '.join(ARCHITECTURES)}."
    )
  wanted = ARCHITECTURES[family]
  for name in values.get("architectures") or ():
    if name.lower() != wanted.lower():
      raise UserError(f"{where}: architectures names {name!r}; {wanted!r} is what is supported.")
  return family


def _check_keys(values, family, where):
  bad, unknown = [], []
  only = _ONLY | _ONLY_IN[family]
  for key, value in values.items():
    if value is None:
      continue
    if key in only:
      if value not in only[key]:
        bad.append(f"{key}={json.dumps(value)}")
    elif key not in _READ and key not in _HARMLESS:
      unknown.append(f"{key}={json.dumps(value)}")
  if bad:
    raise UserError(f"{where}: not supported for {family}: {', '.join(bad)}.")
  if unknown:
    raise UserError(
      f"{where}: unknown {', '.join(unknown)}; remove what does not change what the model computes."
    )


def _windows(c, family, layers, where):
  """Each layer's sliding window, by the rules of the family."""
  window = c.get("sliding_window")
  if family == "mistral":
    first_sliding = 0
  elif family in ("qwen2", "qwen3"):
    window = window if _flag(c, "use_sliding_window", where) else None
    first_sliding = c["max_window_layers"]
  else:
    first_sliding = layers
  if window is not None:
    window = _count(c, "sliding_window", where)
  derived = tuple(window if i >= first_sliding else None for i in range(layers))
  types = c.get("layer_types")
  if types is None:
    return derived
  known = {"full_attention": None, "attention": None, "sliding_attention": window}
  if not isinstance(types, list) or len(types) != layers or not set(types) <= known.keys():
    raise UserError(
      f"{where}: layer_types must name full_attention or sliding_attention for each of {layers}"
      f" layers, not {json.dumps(types)}."
    )
  if "sliding_attention" in types and window is None:
    raise UserError(f"{where}: layer_types has sliding_attention, but no sliding_window is in use.")
  given = tuple(known[name] for name in types)
  if family in ("llama", "mistral") and given != derived:
    raise UserError(f"{where}: layer_types contradicts what {family} computes; remove it.")
  return given


def _count(c, key, where) -> int:
  value = c.get(key)
  if type(value) is not int or value < 1:
    raise UserError(f"{where}: {key} must be a positive integer, not {value!r}.")
  return value


def _flag(c, key, where) -> bool:
  value = c.get(key, False)
  if type(value) is not bool:
    raise UserError(f"{where}: {key} must be true or false, not {value!r}.")
  return value
