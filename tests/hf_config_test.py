"""Every key of config.json is read, known to be harmless, or stops by name."""

import json
import math

import fuzzing
import numpy as np
import pytest
from hypothesis import strategies as st

from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import rope as hf_rope
from refine_jax.hf.families import FAMILIES
from refine_jax.model.rope import RopeConfig, inverse_frequencies
from refine_jax.model.transformer import param_shapes

LLAMA = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
  "hidden_act": "silu",
}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = QWEN2 | {"model_type": "qwen3", "architectures": None}
# As google/gemma-3-1b-it has it, in transformers 4's spelling, with fewer layers.
GEMMA3 = {
  "architectures": ["Gemma3ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "attn_logit_softcapping": None,
  "bos_token_id": 2,
  "cache_implementation": "hybrid",
  "eos_token_id": [1, 106],
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152,
  "initializer_range": 0.02,
  "intermediate_size": 6912,
  "max_position_embeddings": 32768,
  "model_type": "gemma3_text",
  "num_attention_heads": 4,
  "num_hidden_layers": 8,
  "num_key_value_heads": 1,
  "pad_token_id": 0,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.50.0.dev0",
  "use_cache": True,
  "vocab_size": 262144,
}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


@pytest.mark.parametrize(
  "changes, named",
  [
    ({"model_type": "gemma2"}, "model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"sliding_window": 8}, "sliding_window"),
    ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
    ({"logit_scale": 0.5}, "logit_scale"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": 33}, "hidden_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 1}}, "twist"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "layer type"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
  ],
)
def test_what_is_not_supported_stops_by_name(changes, named):
  with pytest.raises(UserError, match=named):
    hf_config.from_hf(LLAMA | changes)


@pytest.mark.parametrize(
  "base, changes, named",
  [
    (QWEN2, {"attention_bias": False}, "attention_bias"),
    (QWEN2, {"use_mrope": True}, "use_mrope"),
    (QWEN2, {"layer_types": ["full_attention"]}, "layer_types"),
    (QWEN3, {"mlp_bias": True}, "mlp_bias"),
    (MISTRAL, {"attention_bias": True}, "attention_bias"),
    (MISTRAL, {"layer_types": ["full_attention"] * 3}, "layer_types"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3, {"hidden_activation": "silu"}, "hidden_activation"),
    (GEMMA3, {"sliding_window": None}, "sliding_window"),
    (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    (GEMMA3, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
    (
      GEMMA3 | {"rope_scaling": None},
      {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
      "rope_theta",
    ),
    (GEMMA3, {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2}}}, "linear"),
    (LLAMA, {"rope_local_base_freq": 1e4}, "rope_local_base_freq"),
  ],
)
def test_a_value_other_than_the_one_that_a_family_fixes_is_refused(base, changes, named):
  with pytest.raises(UserError, match=named):
    hf_config.from_hf(base | changes)


def test_bookkeeping_is_harmless_and_null_is_absence():
  extra = {
    "torch_dtype": "bfloat16",
    "temperature": 0.6,
    "use_cache": True,
    "pretraining_tp": 1,
    "transformers.js_config": {},
    "quantization_config": None,
    "some_future_key": None,
  }
  assert hf_config.from_hf(LLAMA | extra) == hf_config.from_hf(LLAMA)


def test_the_two_spellings_of_rope_mean_the_same():
  scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  old = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}}
  new = LLAMA | {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}}
  want = hf_config.from_hf(old)
  assert want.rope.theta == 5e5 and want.rope.original_length == 256
  assert hf_config.from_hf(new) == want
  for values in (old, new):  # and what is exported has both
    both = hf_rope.both_spellings(values, FAMILIES["llama"])
    assert both.keys() >= {"rope_theta", "rope_scaling", "rope_parameters"}
    assert hf_config.from_hf(both) == want


def test_gemma3_is_read_in_both_spellings():
  config = hf_config.from_hf(GEMMA3)
  assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 8.0)
  assert config.sliding_rope == RopeConfig(theta=1e4)
  assert config.windows == (512,) * 5 + (None,) + (512,) * 2
  assert config.attention_scale == 1 / 16 and config.embedding_scale == 1152**0.5
  assert config.norm_offset and config.post_norms and config.qk_norm and config.tied_head
  new = {k: v for k, v in GEMMA3.items() if not k.startswith(("rope", "sliding_window_pattern"))}
  new["rope_parameters"] = {
    "full_attention": GEMMA3["rope_scaling"] | {"rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
  }
  new["layer_types"] = [
    "full_attention" if w is None else "sliding_attention" for w in config.windows
  ]
  assert hf_config.from_hf(new) == config
  assert hf_config.from_hf(hf_rope.both_spellings(new, FAMILIES["gemma3_text"])) == config


def test_windows_follow_the_family():
  windows = lambda base, **c: hf_config.from_hf(base | c).windows  # noqa: E731
  assert windows(MISTRAL) == (4096,) * 3
  assert windows(MISTRAL, sliding_window=None) == (None,) * 3
  assert windows(QWEN2, sliding_window=8) == (None,) * 3
  sliding = {"use_sliding_window": True, "sliding_window": 8}
  assert windows(QWEN2, **sliding, max_window_layers=2) == (None, None, 8)
  types = ["sliding_attention", "full_attention", "full_attention"]
  assert windows(QWEN3, **sliding, layer_types=types) == (8, None, None)


def test_yarn_extends_the_length_that_qwen_leaves_unchanged():
  yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
  assert hf_config.from_hf(QWEN2 | {"rope_scaling": yarn}).max_length == 1024


@pytest.mark.parametrize(
  "text, said",
  [
    (None, "does not exist"),
    (b"{", "as JSON"),
    (b"[]", "JSON object"),
    (b'{"a":' * 100_000, "as JSON"),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", "as JSON .*digits"),
    (b'{"vocab_size": 61, "vocab_size": 62}', "'vocab_size' occurs twice"),
    (json.dumps(LLAMA).encode("utf-8-sig"), "BOM"),
    (json.dumps(LLAMA).encode("utf-16"), "as JSON"),
  ],
  ids=["missing", "cut", "list", "deep", "digits", "twice", "bom", "utf-16"],
)
def test_a_missing_or_damaged_config_is_named(text, said, tmp_path):
  if text is not None:
    (tmp_path / "config.json").write_bytes(text)
  with pytest.raises(UserError, match=f"config.json.*{said}") as error:
    hf_config.read_model_config(tmp_path)
  assert len(str(error.value)) < 400


NO_FACTOR = (0, -1.0, math.inf, math.nan, 1e-9, 1e300)
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
  "changes, named",
  [
    *(({"rms_norm_eps": x}, "rms_norm_eps") for x in (0, -1e-6, math.inf, math.nan, 1e-300)),
    *(({"rope_theta": x}, "rope_theta") for x in (0, -1e4, math.inf, math.nan, 1.0, 1e300)),
    *(({"rope_scaling": {"type": "linear", "factor": x}}, "factor") for x in NO_FACTOR),
    *(({"rope_scaling": YARN | {"attention_factor": x}}, "attention_factor") for x in NO_FACTOR),
    ({"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 2.0}}, "beta_fast"),
    ({"rope_scaling": YARN | {"mscale": -1.0, "mscale_all_dim": 1.0}}, "mscale"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"initializer_range": -0.1}, "initializer_range"),
    ({"initializer_range": math.nan}, "initializer_range"),
  ],
)
def test_numbers_that_give_no_finite_logit_are_refused(changes, named):
  with pytest.raises(UserError, match=named):
    hf_config.from_hf(LLAMA | changes)


@pytest.mark.parametrize("scalar", [0, -256, math.inf, math.nan])
def test_a_query_scalar_that_gives_no_finite_logit_is_refused(scalar):
  with pytest.raises(UserError, match="query_pre_attn_scalar"):
    hf_config.from_hf(GEMMA3 | {"query_pre_attn_scalar": scalar})


SIZES = (
  "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim"
  " num_key_value_heads max_position_embeddings sliding_window"
).split()


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [10**12, 2**31, 0, -1, True, 8.0, "8", [], {}, [8], math.nan])
def test_a_size_of_no_model_is_refused_at_once(key, value):
  with pytest.raises(UserError, match=key):
    hf_config.from_hf(GEMMA3 | {key: value})


@pytest.mark.parametrize(
  "key, values",
  [
    ("model_type", (1, [], {}, ["llama"])),
    ("architectures", (5, "LlamaForCausalLM", {}, [5], [["x"]], {"a": 1})),
    ("tie_word_embeddings", (1, "true", [], {})),
    ("attention_bias", (0, "no", [])),
    ("mlp_bias", (0, "no", [])),
    ("hidden_act", (1, [], ["silu"], {})),
    ("attention_dropout", (False, "0", [], {})),
    ("partial_rotary_factor", (True, "1", [1])),
    ("layer_types", (5, "full_attention", {}, [[]] * 3, [{}] * 3, [1, 2, 3], [])),
    ("rope_theta", ("1e4", [], {}, True)),
    ("rope_scaling", (5, "linear", [], False, {"type": []}, {"type": {}}, {"rope_type": 5})),
    ("rope_parameters", (5, "linear", [1], {"rope_type": ["default"]}, {"rope_theta": [1]})),
    ("rms_norm_eps", ("1e-6", [], {}, True)),
    ("max_window_layers", ("1", [], {}, True, 1.5, -1)),
    ("use_sliding_window", (1, "true", [])),
  ],
)
def test_a_value_of_a_wrong_type_is_named(key, values):
  base = QWEN2 if "window" in key else LLAMA
  for value in values:
    with pytest.raises(UserError, match=key.partition("_")[0]):
      hf_config.from_hf(base | {key: value})


DOCUMENTS = (
  LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
  MISTRAL | {"sliding_window": 8, "rms_norm_eps": 1e-5, "head_dim": 8},
  QWEN2 | {"use_sliding_window": True, "max_window_layers": 1, "rope_parameters": YARN},
  QWEN3 | {"layer_types": ["full_attention"] * 3, "attention_bias": True, "head_dim": 8},
  GEMMA3,
)


@fuzzing.fuzz(content=st.sampled_from(DOCUMENTS).flatmap(fuzzing.damaged_json))
def test_a_damaged_config_is_refused_or_gives_a_model_with_finite_angles(content, tmp_path):
  (tmp_path / "config.json").write_bytes(content)
  config = fuzzing.taken_or_refused(hf_config.read_model_config, tmp_path)
  if isinstance(config, UserError):
    return
  param_shapes(config)
  for rope in filter(None, (config.rope, config.sliding_rope)):
    last = np.float32(config.max_length) * inverse_frequencies(rope, config.head_dim)
    assert np.isfinite(last).all() and np.isfinite(rope.attention_factor)


def test_a_good_file_is_read(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(LLAMA))
  assert hf_config.read_model_config(tmp_path) == hf_config.from_hf(LLAMA)
