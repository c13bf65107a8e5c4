"""ModelConfig over time: what checkpoints wrote of it stays comparable."""

import dataclasses

import pytest
import train_fixtures as tiny

from refine_jax.model import config as model_config
from refine_jax.training import startup

# What the first checkpoints hold of `tiny_config()`.
FIRST = {
  "vocab_size": 37,
  "width": 32,
  "feed_forward": 48,
  "layers": 2,
  "heads": 4,
  "kv_heads": 2,
  "head_dim": 8,
  "norm_eps": 1e-05,
  "rope": {
    "theta": 10000.0,
    "kind": "default",
    "factor": 1.0,
    "original_length": 0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "attention_factor": 1.0,
  },
  "tied_head": False,
  "qkv_bias": True,
  "output_bias": False,
  "mlp_bias": False,
  "qk_norm": False,
  "windows": [None, None],
  "max_length": 128,
  "initializer_range": 0.3,
}


def test_a_checkpoint_from_before_a_field_was_added_is_of_the_same_model():
  assert startup.identity(tiny.tiny_config()) == FIRST


@pytest.mark.parametrize(
  "field", [f.name for f in dataclasses.fields(model_config.ModelConfig) if f.name not in FIRST]
)
def test_a_model_that_uses_a_later_field_is_another_one(field):
  found = startup.identity(tiny.tiny_config(**{field: tiny.GEMMA3[field]}))
  assert found != FIRST and {k: v for k, v in found.items() if k != field} == FIRST
