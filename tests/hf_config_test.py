"""Every key of config.json is read, known to be harmless, or stops by name."""

import json

import pytest

from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import rope as hf_rope
from refine_jax.hf.families import FAMILIES

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
  ],
)
def test_so_does_what_a_family_fixes(base, changes, named):
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
  "text, said", [(None, "does not exist"), ("{", "as JSON"), ("[]", "JSON object")]
)
def test_a_missing_or_damaged_config_is_named(text, said, tmp_path):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=f"config.json.*{said}"):
    hf_config.read_model_config(tmp_path)


def test_a_good_file_is_read(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(LLAMA))
  assert hf_config.read_model_config(tmp_path) == hf_config.from_hf(LLAMA)
