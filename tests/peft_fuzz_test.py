"""Damaged files of an adapter: read as what they are, or refused in one line."""

import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from adapter_fixtures import random_adapter
from fuzzing import damaged_bytes, damaged_json, fuzz, taken_or_refused
from hf_fuzz_test import CONFIG, SHAPE, offline

from refine_jax.errors import UserError
from refine_jax.hf import peft
from refine_jax.hf.families import family_of
from refine_jax.model import adapters

FAMILY = family_of(CONFIG)


def adapter_files() -> tuple[dict, bytes]:
  """The configuration and the weights of a small adapter."""
  with tempfile.TemporaryDirectory() as place:
    adapter = random_adapter(SHAPE, kind="lora", rank=2, projections=("query", "down"))
    peft.write(Path(place), adapter, SHAPE, FAMILY, base="somebody/tiny")
    config = json.loads((Path(place) / peft.CONFIG).read_text())
    return config, (Path(place) / peft.WEIGHTS).read_bytes()


ADAPTER, WEIGHTS = adapter_files()


@pytest.fixture
def directory(tmp_path):
  (tmp_path / peft.CONFIG).write_text(json.dumps(ADAPTER))
  (tmp_path / peft.WEIGHTS).write_bytes(WEIGHTS)
  return tmp_path


def check_read(directory):
  """What is taken has the shapes of its rank, and floats that are finite."""
  result = taken_or_refused(peft.read, directory, SHAPE, FAMILY, kind="lora")
  if not isinstance(result, UserError):
    want = jax.eval_shape(lambda: adapters.init_params(SHAPE, result.shape, jax.random.key(0)))
    jax.tree.map(lambda x, s: np.testing.assert_equal(x.shape, s.shape), result.factors, want)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.factors))


@fuzz(content=damaged_json(ADAPTER))
def test_damaged_adapter_configs_are_read_or_refused(content, directory, monkeypatch):
  monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
  (directory / peft.CONFIG).write_bytes(content)
  check_read(directory)
  base = taken_or_refused(peft.find_base, directory)
  assert isinstance(base, UserError) or base.is_dir()


@fuzz(content=damaged_bytes(WEIGHTS))
def test_damaged_adapter_weights_are_read_or_refused(content, directory):
  (directory / peft.WEIGHTS).write_bytes(content)
  check_read(directory)
