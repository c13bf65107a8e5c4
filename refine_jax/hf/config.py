"""Hugging Face's config.json -> ModelConfig, with every key accounted for.

A key is read, or known not to change what the model computes, or it stops the program by name.
Both spellings are understood: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
transformers 5 (`rope_parameters`, `dtype`).
"""

import functools
import json
from pathlib import Path

from refine_jax.errors import UserError
from refine_jax.hf.families import Family, family_of
from refine_jax.hf.rope import read_ropes
from refine_jax.hf.values import MOST, count, flag, number
from refine_jax.model.config import ModelConfig
from refine_jax.quoting import shown, some

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
# In these keys null is a value; in all others it means that the key is absent.
_NULL_IS_A_VALUE = ("sliding_window", "head_dim", "num_key_value_heads")
# Keys that would change the computation, and the values that do not. null is always one.
_ONLY = {
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
# The largest that is taken for a model; what is larger would only end for want of memory.
_MOST = {
  "num_hidden_layers": 10_000,
  "vocab_size": 2**24,
  "hidden_size": 2**20,
  "intermediate_size": 2**22,
  "num_attention_heads": 2**13,
  "num_key_value_heads": 2**13,
  "head_dim": 2**13,
}
# Between these norms and scores of ordinary activations are finite in float32.
_EPS = (1e-30, 1.0)
_INITIALIZER_RANGE = (0.0, 1e3)
_QUERY_SCALAR = (1e-6, 1e9)


def read_json(directory: str | Path, name: str = "config.json") -> dict:
  """A JSON object from a file of a model's directory.

  Raises:
    UserError: no such file, or not a JSON object in UTF-8 with each key once.
  """
  path = Path(directory) / name
  try:
    if path.exists() and not path.is_file():  # reading a pipe or a device would never end
      raise UserError(f"{path} is not a file; give a Hugging Face model directory.")
    value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
  except FileNotFoundError:
    raise UserError(f"{path} does not exist; give a Hugging Face model directory.") from None
  except (OSError, ValueError, RecursionError) as error:
    reason = str(error).partition(";")[0]
    raise UserError(f"{path} cannot be read as JSON ({reason}); copy it anew.") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}.")
  return value


def _without_doubles(pairs):
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [key for key, _ in pairs]
    double = next(key for key in names if names.count(key) > 1)
    raise ValueError(f"the key {shown(double)} occurs twice")
  return values


def read_family(directory: str | Path) -> Family:
  """The family of the model in a Hugging Face directory.

  Raises:
    UserError: config.json is missing, damaged, or names none that is supported.
  """
  return family_of(read_json(directory), str(Path(directory) / "config.json"))


def read_model_config(directory: str | Path) -> ModelConfig:
  """The shape of the model in a Hugging Face directory.

  Raises:
    UserError: config.json is missing, damaged, or asks for what is not supported.
  """
  return from_hf(read_json(directory), str(Path(directory) / "config.json"))


def from_hf(values: dict, where: str = "config.json") -> ModelConfig:
  """The model's shape from the content of a config.json; `where` names it in messages.

  Raises:
    UserError: naming the key that is missing, malformed, or not supported.
  """
  family = family_of(values, where)
  _check_keys(values, family, where)
  given = {k: v for k, v in values.items() if v is not None or k in _NULL_IS_A_VALUE}
  c = {"rms_norm_eps": 1e-6, "initializer_range": 0.02} | dict(family.defaults) | given
  size = functools.partial(_size, c, where=where)
  heads, kv_heads, head_dim = _head_sizes(c, where)
  max_length = size("max_position_embeddings")
  rope, sliding_rope = read_ropes(c, family, max_length, where)
  if rope.kind == "yarn":  # Qwen's instructions add YaRN and leave max_position_embeddings alone.
    max_length = max(max_length, int(rope.factor * rope.original_length))
  bias = flag(c, "attention_bias", where)
  width, layers = size("hidden_size"), size("num_hidden_layers")
  scalar = c.get("query_pre_attn_scalar")
  if scalar is not None:
    scalar = number(scalar, "query_pre_attn_scalar", where, *_QUERY_SCALAR)
  return ModelConfig(
    vocab_size=size("vocab_size"),
    width=width,
    feed_forward=size("intermediate_size"),
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    norm_eps=number(c["rms_norm_eps"], "rms_norm_eps", where, *_EPS),
    rope=rope,
    sliding_rope=sliding_rope,
    tied_head=flag(c, "tie_word_embeddings", where),
    qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
    output_bias=bias if family.output_bias is None else family.output_bias,
    mlp_bias=flag(c, "mlp_bias", where),
    qk_norm=family.qk_norm,
    windows=_windows(c, family, layers, where),
    max_length=max_length,
    initializer_range=number(
      c["initializer_range"], "initializer_range", where, *_INITIALIZER_RANGE
    ),
    attention_scale=None if scalar is None else scalar**-0.5,
    embedding_scale=width**0.5 if family.embedding_scaled else None,
    norm_offset=family.norm_offset,
    post_norms=family.post_norms,
    activation=family.activation,
  )


def _size(c, key, where) -> int:
  return count(c, key, where, most=_MOST.get(key, MOST))


def _head_sizes(c, where) -> tuple[int, int, int]:
  """Query heads, key/value heads, and the width of each."""
  heads, width = _size(c, "num_attention_heads", where), _size(c, "hidden_size", where)
  kv_heads = heads
  if c.get("num_key_value_heads") is not None:
    kv_heads = _size(c, "num_key_value_heads", where)
  if heads % kv_heads:
    raise UserError(
      f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
    )
  if c.get("head_dim") is not None:
    head_dim = _size(c, "head_dim", where)
  elif width % heads:
    raise UserError(
      f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads};"
      " set head_dim."
    )
  else:
    head_dim = width // heads
  if head_dim % 2:
    raise UserError(f"{where}: head_dim={head_dim} is odd; rotary embeddings need an even one.")
  return heads, kv_heads, head_dim


def _check_keys(values, family, where):
  bad, unknown = [], []
  only = _ONLY | family.only
  known = _READ | _HARMLESS | family.harmless | family.defaults.keys()
  if family.sliding_rope_theta is not None:
    known |= {"rope_local_base_freq"}
  for key, value in values.items():
    if value is None:
      continue
    if key in only:
      # true is no 1, though Python has them equal.
      if not any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in only[key]):
        bad.append(f"{key}={shown(value)}")
    elif key not in known:
      unknown.append(f"{shown(key)[1:-1]}={shown(value)}")
  if bad:
    raise UserError(f"{where}: not supported for {family.model_type}: {some(bad)}.")
  if unknown:
    raise UserError(
      f"{where}: unknown {some(unknown)}; remove what does not change what the model computes."
    )


def _windows(c, family, layers, where) -> tuple[int | None, ...]:
  """Each layer's sliding window."""
  for key in ("sliding_window_pattern", "max_window_layers"):
    if key in family.defaults:
      count(c, key, where, least=0 if key == "max_window_layers" else 1)
  window = c.get("sliding_window")
  if window is not None:
    window = count(c, "sliding_window", where)
  if not flag(c, "use_sliding_window", where, default=True):
    window = None
  if window is None and family.sliding_rope_theta is not None:
    raise UserError(f"{where}: sliding_window must be a whole number, as {family.model_type}'s is.")
  derived = tuple(window if family.sliding(c, i) else None for i in range(layers))
  types = c.get("layer_types")
  if types is None:
    return derived
  known = {"full_attention": None, "attention": None, "sliding_attention": window}
  if (
    not isinstance(types, list)
    or len(types) != layers
    or not all(isinstance(name, str) and name in known for name in types)
  ):
    raise UserError(
      f"{where}: layer_types must name full_attention or sliding_attention for each of {layers}"
      f" layers, not {shown(types)}."
    )
  if "sliding_attention" in types and window is None:
    raise UserError(f"{where}: layer_types has sliding_attention, but no sliding_window is in use.")
  given = tuple(known[name] for name in types)
  if given != derived and not family.layer_types_decide:
    raise UserError(
      f"{where}: layer_types contradicts what {family.model_type} computes; remove it."
    )
  return given
