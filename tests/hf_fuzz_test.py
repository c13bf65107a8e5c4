"""Damaged files of a model's directory: read as what they are, or refused in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from fuzzing import damaged_bytes, damaged_json, fuzz, taken_or_refused
from hypothesis import strategies as st

from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.export import export
from refine_jax.hf.families import family_of
from refine_jax.hf.generation_config import describe_generation, read_generation_config
from refine_jax.model import transformer

CONFIG = {
  "model_type": "llama",
  "vocab_size": 7,
  "hidden_size": 4,
  "intermediate_size": 6,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 2,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
  "max_position_embeddings": 32,
  "eos_token_id": 1,
}
SHAPE = hf_config.from_hf(CONFIG)
GENERATION = {
  "eos_token_id": [1, 2],
  "pad_token_id": 0,
  "refinement": {"noise_token": 3, "block_size": 4, "random_noise": True, "adapter": "adapter"},
  "do_sample": True,
}


def one_file():
  """The bytes of a small model.safetensors, as (header, data)."""
  shapes = {
    name: shape for name, (_, _, shape) in hf_weights.tensor_names(SHAPE, family_of(CONFIG)).items()
  }
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape in shapes.items():
    size = 4 * int(np.prod(shape))
    header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
    end += size
  return header, np.linspace(-1, 1, end // 4, dtype=np.float32).tobytes()


HEADER, DATA = one_file()


def assembled(header: bytes, data: bytes = DATA) -> bytes:
  return len(header).to_bytes(8, "little") + header + data


WHOLE = assembled(json.dumps(HEADER).encode())
INDEX = {
  "metadata": {"total_size": len(DATA)},
  "weight_map": {name: "model-1.safetensors" for name in list(HEADER)[1:]},
}


@pytest.fixture
def directory(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  (tmp_path / "model.safetensors").write_bytes(WHOLE)
  return tmp_path


def check_params(params):
  """What is taken has each leaf's shape, and floats that are finite."""
  want = transformer.param_shapes(SHAPE)
  jax.tree.map(lambda x, s: np.testing.assert_equal(x.shape, s.shape), params, want)
  assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(params))


def test_the_whole_file_is_taken(directory):
  check_params(hf_weights.load_params(directory, SHAPE))


@fuzz(
  content=damaged_json(HEADER).map(assembled)
  | damaged_bytes(WHOLE)
  | st.builds(lambda size: size.to_bytes(8, "little") + WHOLE[8:], st.integers(0, 2**64 - 1))
)
def test_damaged_weights_are_read_or_refused(content, directory):
  (directory / "model.safetensors").write_bytes(content)
  result = taken_or_refused(hf_weights.load_params, directory, SHAPE)
  if not isinstance(result, UserError):
    check_params(result)


@fuzz(content=damaged_json(INDEX))
def test_damaged_indices_are_read_or_refused(content, directory):
  (directory / "model.safetensors").unlink(missing_ok=True)
  (directory / "model-1.safetensors").write_bytes(WHOLE)
  (directory / "model.safetensors.index.json").write_bytes(content)
  result = taken_or_refused(hf_weights.load_params, directory, SHAPE)
  if not isinstance(result, UserError):
    check_params(result)


@fuzz(content=damaged_json(GENERATION))
def test_damaged_generation_configs_are_read_or_refused(content, directory):
  (directory / "generation_config.json").write_bytes(content)
  found = taken_or_refused(read_generation_config, directory, SHAPE)
  if not isinstance(found, UserError):
    ids = [*(found.eos_token_ids or ()), found.refinement.noise_token if found.refinement else 0]
    assert all(type(i) is int and 0 <= i < SHAPE.vocab_size for i in ids)
  written = taken_or_refused(describe_generation, directory, 5, {"noise_token": 3})
  assert isinstance(written, UserError) or 5 in np.atleast_1d(written["eos_token_id"])


@fuzz(name=st.text(max_size=12) | st.sampled_from(["~nosuchuser", "x" * 5000, "a/" * 3000, "\x00"]))
def test_any_name_of_a_model_is_one_line(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
  result = taken_or_refused(hf_weights.find, name)
  assert isinstance(result, UserError) or result.is_dir()


def offline(name, **_):
  raise OSError("offline")


def test_an_export_of_what_was_taken_is_the_file_again(directory):
  params = hf_weights.load_params(directory, SHAPE)
  shutil.rmtree(directory / "out", ignore_errors=True)
  output = export(params, directory, directory / "out", dtype="float32")
  again = hf_weights.load_params(output, SHAPE)
  jax.tree.map(np.testing.assert_array_equal, again, params)
