"""Our logits and blocks against transformers, in float32 on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refine_jax.attention import packed
from refine_jax.decoding import loading
from refine_jax.hf import config as hf_config
from refine_jax.model import layer as layer_lib
from refine_jax.model import rope, transformer
from tests.hf_fixtures import random_ids, tiny_hf_model, torch_logits

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
BASE = {"rope_theta": 10000.0}
CASES = {
  "llama": ("llama", {}),
  "llama tied": ("llama", {"tie_word_embeddings": True}),
  "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
  "llama head_dim": ("llama", {"head_dim": 12}),
  "llama one kv head": ("llama", {"num_key_value_heads": 1}),
  "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
  "llama linear": ("llama", {"rope_parameters": BASE | {"rope_type": "linear", "factor": 3.0}}),
  "llama llama3": ("llama", {"rope_parameters": BASE | LLAMA3}),
  "mistral": ("mistral", {}),
  "mistral window": ("mistral", {"sliding_window": 7}),
  "mistral head_dim": ("mistral", {"head_dim": 16}),
  "qwen2": ("qwen2", {}),
  "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
  "qwen2 windows": (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen2 yarn": ("qwen2", {"rope_parameters": BASE | YARN}),
  "qwen2 yarn factor": ("qwen2", {"rope_parameters": BASE | YARN | {"attention_factor": 1.3}}),
  "qwen2 yarn mscale": (
    "qwen2",
    {"rope_parameters": BASE | YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}},
  ),
  "qwen2 yarn ramp": (
    "qwen2",
    {"rope_parameters": BASE | YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}},
  ),
  "qwen3": ("qwen3", {}),
  "qwen3 head_dim, bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
  "qwen3 layer_types": (
    "qwen3",
    {
      "use_sliding_window": True,
      "sliding_window": 4,
      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
  ),
  "gemma3": ("gemma3_text", {}),
  "gemma3 own head, biases": (
    "gemma3_text",
    {"tie_word_embeddings": False, "attention_bias": True, "sliding_window_pattern": 3},
  ),
  "gemma3 ropes": (
    "gemma3_text",
    {
      "layer_types": ["full_attention", "sliding_attention", "full_attention"],
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
      },
    },
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case, tmp_path):
  family, overrides = CASES[case]
  directory, torch_model = tiny_hf_model(family, tmp_path, **overrides)
  ids = random_ids((2, 40))
  ours = np.asarray(loading.load(directory)(ids))
  assert ours.dtype == np.float32
  difference = np.abs(ours - torch_logits(torch_model, ids)).max()
  print(f"{case}: {difference:.1e}")
  assert difference < 1e-4


def test_packed_segments_equal_the_same_rows_alone(tmp_path):
  directory, torch_model = tiny_hf_model("mistral", tmp_path, sliding_window=6)
  first, second = random_ids((1, 17)), random_ids((1, 11), seed=1)
  ids = np.concatenate([first, second, np.zeros((1, 4), np.int32)], axis=1)
  segments = np.repeat([1, 2, 0], [17, 11, 4])[None]
  packed = np.asarray(loading.load(directory)(ids, segments))
  np.testing.assert_allclose(packed[:, :17], torch_logits(torch_model, first), atol=1e-4)
  np.testing.assert_allclose(packed[:, 17:28], torch_logits(torch_model, second), atol=1e-4)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def blocks(request, tmp_path_factory):
  """(torch model, ours, the parameters of our layer 1, an input [B, T, D])."""
  extra = {"attention_bias": True, "mlp_bias": True} if request.param == "llama" else {}
  directory, torch_model = tiny_hf_model(request.param, tmp_path_factory.mktemp("blocks"), **extra)
  ours = loading.load(directory)
  layer = jax.tree.map(lambda x: x[1], ours.params["layers"])
  x = np.random.default_rng(1).normal(size=(2, 9, ours.config.width)).astype(np.float32)
  return torch_model, ours, layer, x


def _run(module, params, *args):
  return module.apply({"params": params}, *args)


def _torch_rotation(torch_model, x):
  # Where ropes differ by layer type, layer 1 is one that sees all.
  kind = ("full_attention",) if torch_model.config.model_type == "gemma3_text" else ()
  return torch_model.model.rotary_emb(torch.from_numpy(x), torch.arange(x.shape[1])[None], *kind)


def _context(ours, x):
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  rotation = rope.rotation(ours.config.rope, ours.config.head_dim, positions)
  return rotation, packed.attend_with(jnp.ones(x.shape[:2], jnp.int32))(None)


def _causal_mask(length):
  return torch.full((1, 1, length, length), -torch.inf).triu(1)


def test_norm(blocks):
  torch_model, ours, layer, x = blocks
  theirs = torch_model.model.layers[1].input_layernorm(torch.from_numpy(x)).detach()
  got = _run(transformer.norm(ours.config), layer["attention_norm"], x)
  np.testing.assert_allclose(got, theirs, atol=1e-5)


def test_mlp(blocks):
  torch_model, ours, layer, x = blocks
  theirs = torch_model.model.layers[1].mlp(torch.from_numpy(x)).detach()
  np.testing.assert_allclose(_run(layer_lib.MLP(ours.config), layer["mlp"], x), theirs, atol=1e-5)


def test_attention(blocks):
  torch_model, ours, layer, x = blocks
  theirs = (
    torch_model.model.layers[1]
    .self_attn(
      hidden_states=torch.from_numpy(x),
      position_embeddings=_torch_rotation(torch_model, x),
      attention_mask=_causal_mask(x.shape[1]),
    )[0]
    .detach()
  )
  rotation, attend = _context(ours, x)
  got, _ = _run(layer_lib.Attention(ours.config), layer["attention"], x, rotation, attend)
  np.testing.assert_allclose(got, theirs, atol=1e-5)


def test_layer(blocks):
  torch_model, ours, layer, x = blocks
  theirs = torch_model.model.layers[1](
    torch.from_numpy(x),
    position_embeddings=_torch_rotation(torch_model, x),
    attention_mask=_causal_mask(x.shape[1]),
  )
  theirs = theirs[0] if isinstance(theirs, tuple) else theirs
  rotation, attend = _context(ours, x)
  got, _ = _run(layer_lib.Layer(ours.config), layer, x, rotation, attend)
  np.testing.assert_allclose(got, theirs.detach(), atol=1e-5)


@pytest.mark.parametrize(
  "case", [c for c in CASES if "rope_theta" in CASES[c][1].get("rope_parameters", ())]
)
def test_rotation(case, tmp_path):
  family, overrides = CASES[case]
  directory, torch_model = tiny_hf_model(family, tmp_path, **overrides)
  config = hf_config.read_model_config(directory)
  positions = torch.arange(200)[None]
  cos, sin = torch_model.model.rotary_emb(torch.zeros(1), positions)
  ours = rope.rotation(config.rope, config.head_dim, jnp.arange(200)[None])
  for got, want in zip(ours, (cos, sin), strict=True):
    np.testing.assert_allclose(got[:, :, 0], want[..., : config.head_dim // 2], atol=3e-5)
