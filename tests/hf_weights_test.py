"""Weights in and out: bit-exact, strict both ways, bad files named."""

import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers

from refine_jax.decoding import loading
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import export as hf_export
from refine_jax.hf import weights as hf_weights
from tests.hf_fixtures import FAMILIES, random_ids, tiny_hf_model, torch_logits


def _bits(directory):
  """name -> (dtype, shape, bytes) over all files of a directory."""
  result = {}
  for path in sorted(directory.glob("*.safetensors")):
    with safetensors.safe_open(path, "numpy") as file:
      for name in file.keys():
        x = file.get_tensor(name)
        result[name] = (x.dtype.name, x.shape, x.tobytes())
  return result


def _rewrite(directory, change):
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_is_bit_exact(family, dtype, tmp_path):
  directory, _ = tiny_hf_model(family, tmp_path, dtype=getattr(torch, dtype))
  model = loading.load(directory)
  output = hf_export.export(model.params, directory, tmp_path / "out", dtype=dtype)
  assert _bits(output) == _bits(directory)


def test_the_master_copy_in_float32_exports_to_the_same_bfloat16(tmp_path):
  directory, _ = tiny_hf_model("qwen3", tmp_path, dtype=torch.bfloat16)
  model = loading.load(directory, dtype="float32")
  output = hf_export.export(model.params, directory, tmp_path / "out", dtype="bfloat16")
  assert _bits(output) == _bits(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_export_with_our_logits(family, tmp_path):
  directory, _ = tiny_hf_model(family, tmp_path)
  model = loading.load(directory)
  output = hf_export.export(
    model.params, directory, tmp_path / "out", dtype="float32", shard_bytes=10_000
  )
  assert len(list(output.glob("model-*.safetensors"))) > 1
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    output, output_loading_info=True
  )
  assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  ids = random_ids((2, 20))
  np.testing.assert_allclose(model(ids), torch_logits(theirs.eval(), ids), atol=1e-4)
  np.testing.assert_array_equal(loading.load(output)(ids), model(ids))


def test_missing_unknown_and_misshapen_are_listed_together(tmp_path):
  directory, _ = tiny_hf_model("qwen2", tmp_path)

  def damage(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(5, np.float32)

  _rewrite(directory, damage)
  with pytest.raises(UserError) as error:
    loading.load(directory)
  for part in (
    "missing model.layers.1.mlp.up_proj.weight",
    "unknown model.layers.0.extra.weight",
    "model.norm.weight has shape [5], not [32]",
  ):
    assert part in str(error.value)


def test_old_rotary_buffers_are_ignored(tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path)
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  _rewrite(directory, lambda t: t.update({name: np.ones(4, np.float32)}))
  loading.load(directory)


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path, tie_word_embeddings=True)
  _rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
  assert "head" not in loading.load(directory).params
  _rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
  with pytest.raises(UserError, match="tie_word_embeddings"):
    loading.load(directory)


@pytest.mark.parametrize("keep", [0, 7, 5000])
def test_a_truncated_file_is_named(keep, tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path)
  path = directory / "model.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match="model.safetensors"):
    loading.load(directory)


def test_a_missing_shard_and_a_damaged_index_are_named(tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path)
  output = hf_export.export(
    loading.load(directory).params, directory, tmp_path / "out", shard_bytes=10_000
  )
  shard = sorted(output.glob("model-*.safetensors"))[1]
  shard.unlink()
  with pytest.raises(UserError, match=f"lacks {shard.name}"):
    loading.load(output)
  for text in ("{", "{}"):
    (output / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index.json"):
      loading.load(output)


def test_a_second_copy_under_names_of_another_library_is_not_read(tmp_path):
  directory, _ = tiny_hf_model("mistral", tmp_path)
  want = hf_weights.load_params(directory, hf_config.read_model_config(directory))
  safetensors.numpy.save_file(
    {"tok_embeddings.weight": np.ones(3)}, directory / "consolidated.safetensors"
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    want,
    hf_weights.load_params(directory, hf_config.read_model_config(directory)),
  )


def test_pickles_are_refused(tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path)
  (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
  with pytest.raises(UserError, match="safetensors"):
    loading.load(directory)


def test_leaves_are_placed_one_by_one_under_our_names(tmp_path):
  directory, _ = tiny_hf_model("qwen3", tmp_path)
  config = hf_config.read_model_config(directory)
  placed = {}
  params = hf_weights.load_params(
    directory, config, place=lambda name, x: placed.setdefault(name, x)
  )
  assert placed["layers/attention/query/kernel"].shape == (3, 32, 32)
  assert len(placed) == len(jax.tree.leaves(params))


@pytest.mark.parametrize("used", ["file", "directory"])
def test_a_used_output_is_refused_and_untouched(used, tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path)
  output = tmp_path / "out"
  mine = output if used == "file" else output / "mine"
  mine.parent.mkdir(exist_ok=True)
  mine.write_text("precious")
  with pytest.raises(UserError, match="not empty"):
    hf_export.export(loading.load(directory).params, directory, output)
  assert mine.read_text() == "precious"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
  directory, _ = tiny_hf_model("llama", tmp_path)

  def full(*_, **__):
    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError, match="No space left"):
    hf_export.export(loading.load(directory).params, directory, tmp_path / "out")
  assert sorted(tmp_path.iterdir()) == before


def test_the_exported_config_speaks_to_both_versions(tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path)
  output = hf_export.export(
    loading.load(directory).params, directory, tmp_path / "out", dtype="bfloat16"
  )
  config = json.loads((output / "config.json").read_text())
  assert config["dtype"] == config["torch_dtype"] == "bfloat16"
  assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


def test_end_and_padding_ids_come_from_the_generation_config_first(tmp_path):
  directory, _ = tiny_hf_model("llama", tmp_path)
  path = directory / "generation_config.json"
  path.write_text(json.dumps({"eos_token_id": [7, 1]}))
  model = loading.load(directory)
  assert model.eos_token_ids == (7, 1) and model.pad_token_id == 2
  path.unlink()
  assert loading.load(directory).eos_token_ids == (1,)
  with pytest.raises(UserError, match="token ids"):
    model.require_tokenizer()
