"""Adapters as PEFT directories: read, written, refused, and loaded with their base."""

import json

import hf_fixtures
import jax
import numpy as np
import pytest
import safetensors.numpy
from adapter_fixtures import write_adapter

import refine_jax
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import peft
from refine_jax.model import adapters


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  place = tmp_path_factory.mktemp("bases")
  return {family: hf_fixtures.tiny_hf_model(family, place) for family in ("llama", "gemma3_text")}


def read(directory, base, kind="gated"):
  return peft.read(
    directory, hf_config.read_model_config(base), hf_config.read_family(base), kind=kind
  )


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_adapter_is_read_as_it_was_written(bases, tmp_path, family):
  base, _ = bases[family]
  for i, projections in enumerate([tuple(adapters.PROJECTIONS), ("key", "up")]):
    written = write_adapter(base, tmp_path / f"{i}", projections=projections, alpha=2.5 + i / 2)
    found = read(tmp_path / f"{i}", base)
    assert found.shape == written.shape
    jax.tree.map(np.testing.assert_array_equal, found.factors, written.factors)
  assert peft.find_base(tmp_path / "0") == base


def edited(place, base, values=(), tensors=lambda tensors: tensors, **shape):
  """A written adapter of which something is changed."""
  write_adapter(base, place, **({"kind": "lora"} | shape))
  path = place / peft.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(values)))
  numbers = tensors(safetensors.numpy.load_file(place / peft.WEIGHTS))
  safetensors.numpy.save_file(numbers, place / peft.WEIGHTS)
  return place


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("use_rslora", True),
    ("use_dora", True),
    ("bias", "all"),
    ("modules_to_save", ["lm_head"]),
    ("rank_pattern", {"q_proj": 2}),
    ("alpha_pattern", {"q_proj": 2}),
    ("layers_to_transform", [1]),
    ("fan_in_fan_out", True),
    ("init_lora_weights", "pissa"),
    ("peft_type", "IA3"),
    ("some_later_key", 1),
    ("lora_alpha", "8"),
    ("lora_alpha", float("nan")),
    ("r", 0),
    ("target_modules", ["q_proj", "lm_head"]),
    ("target_modules", 3),
  ],
)
def test_what_would_change_the_computation_is_refused_by_name(bases, tmp_path, key, value):
  base, _ = bases["llama"]
  with pytest.raises(UserError, match=key):
    read(edited(tmp_path / "adapter", base, {key: value}), base)


def test_what_peft_writes_by_default_is_read(bases, tmp_path):
  base, _ = bases["llama"]
  values = {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}}
  values |= {"use_dora": False, "layers_pattern": None, "target_modules": r".*\.(q|k)_proj"}
  place = edited(tmp_path / "adapter", base, values, projections=("query", "key"))
  assert read(place, base).shape.projections == ("query", "key")


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: {k: v for k, v in t.items() if k != NAME}, "missing .*up_proj.lora_A"),
    (lambda t: t | {"base_model.model.lm_head.weight": t[NAME]}, "unknown .*lm_head"),
    (
      lambda t: t | {NAME: t[NAME][:2]},
      r"up_proj.lora_A.weight has shape \[2, 32\], not \[3, 32\]",
    ),
    (lambda t: t | {NAME: t[NAME] * np.float32("nan")}, "up_proj.lora_A.weight .*not finite"),
  ],
)
def test_weights_that_do_not_fit_are_refused_by_name(bases, tmp_path, change, message):
  base, _ = bases["llama"]
  with pytest.raises(UserError, match=message):
    read(edited(tmp_path / "adapter", base, tensors=change), base)


def test_pickled_weights_and_a_lone_gated_adapter_are_refused(bases, tmp_path):
  base, _ = bases["llama"]
  write_adapter(base, tmp_path / "gated")
  with pytest.raises(UserError, match="gated adapter"):
    refine_jax.load(tmp_path / "gated")
  (tmp_path / "gated" / peft.WEIGHTS).rename(tmp_path / "gated" / "adapter_model.bin")
  with pytest.raises(UserError, match="safetensors"):
    refine_jax.load(tmp_path / "gated")


def test_a_factor_that_is_not_finite_is_not_written(bases, tmp_path):
  base, _ = bases["llama"]
  adapter = write_adapter(base, tmp_path / "good")
  adapter.factors["layers"]["mlp"]["up"]["a"][1, 0, 0] = np.inf
  config, family = hf_config.read_model_config(base), hf_config.read_family(base)
  with pytest.raises(UserError, match="layers.1.mlp.up_proj.lora_A"):
    peft.write(tmp_path, adapter, config, family, base="x")
  assert [p.name for p in tmp_path.iterdir()] == ["good"]


def test_a_lora_directory_is_merged_into_the_base_that_it_names(bases, tmp_path, monkeypatch):
  base, _ = bases["llama"]
  ids = hf_fixtures.random_ids((1, 9))
  place = edited(tmp_path / "adapter", base)
  config = hf_config.read_model_config(base)
  wanted = adapters.merge(
    refine_jax.load(base).params, *(lambda a: (a.factors, a.shape))(read(place, base, "lora"))
  )
  model = refine_jax.load(place)
  assert model.adapter is None
  jax.tree.map(np.testing.assert_array_equal, model.params, wanted)
  assert np.abs(model(ids) - refine_jax.load(base)(ids)).max() > 0.01 and config == model.config
  # A path from the adapter's directory, and one from the working directory.
  (tmp_path / "base").symlink_to(base)
  for name in ("../base", "base"):
    path = place / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    monkeypatch.chdir(tmp_path)
    assert peft.find_base(place).resolve() == base
  path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
  with pytest.raises(UserError, match="base_model_name_or_path"):
    refine_jax.load(place)
