"""The frozen base of an adapter, on its way to the devices."""

import warnings

import hf_fixtures
import jax
import numpy as np
import train_fixtures as tiny

from refine_jax import sharding
from refine_jax.config import MeshConfig
from refine_jax.hf import config as hf_config
from refine_jax.hf import weights
from refine_jax.training import frozen
from refine_jax.training.source import ModelSource


def test_the_base_is_in_memory_once_and_as_it_was_stored(tmp_path, monkeypatch):
  directory, _ = hf_fixtures.tiny_hf_model("llama", tmp_path)
  model = hf_config.read_model_config(directory)
  loaded, load = [], weights.load_params

  def spy(*arguments, **options):
    params = load(*arguments, **options)
    loaded.append((params, jax.tree.map(np.array, params)))
    return params

  monkeypatch.setattr(weights, "load_params", spy)
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  forward = tiny.forward(model, mesh=mesh, join=("attention",))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    base, _ = frozen.load_frozen(ModelSource(directory, True, model, None), forward)
  ((params, before),) = loaded
  # A projection that is joined takes new memory, and is freed with `params`.
  kept = (params["embedding"], params["layers"]["mlp"], params["layers"]["attention"]["output"])
  assert all(x.is_deleted() for x in jax.tree.leaves(kept))
  np.testing.assert_array_equal(base["embedding"], before["embedding"])
  jax.tree.map(np.testing.assert_array_equal, base["layers"]["mlp"], before["layers"]["mlp"])
