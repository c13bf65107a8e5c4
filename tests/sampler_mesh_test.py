"""Decoding on several devices: the text of one, with a part of the model and caches on each."""

import jax
import numpy as np
import pytest
import sampler_fixtures as fixtures
from hf_fixtures import tiny_hf_model

import refine_jax
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import requests
from refine_jax.errors import UserError
from refine_jax.planning import collectives

SIZES = {"vocab_size": 60, "num_key_value_heads": 2, "eos_token_id": fixtures.EOS}
PROMPTS = fixtures.unequal_prompts(3, 60)
OPTIONS = {"draft": "branches", "block_size": 3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tiny_hf_model("llama", tmp_path_factory.mktemp("llama"), **SIZES)[0]


def answers(model):
  return refine_jax.generate(model, PROMPTS, max_new_tokens=12, slots=2, **OPTIONS).tokens


def test_the_text_is_that_of_one_device(directory):
  one, two = refine_jax.load(directory), refine_jax.load(directory, tensor=2)
  assert two.mesh.shape["tensor"] == 2 and one.mesh is None
  assert answers(two) == answers(one)
  ids = np.asarray([PROMPTS[0]])
  np.testing.assert_allclose(two(ids), one(ids), rtol=1e-5, atol=1e-5)


def test_each_device_has_its_part_of_the_model_and_the_caches(directory):
  model = refine_jax.load(directory, tensor=2)
  options = Options(**OPTIONS)
  runner = Engine(model, slots=2, options=options).entered(requests(model, PROMPTS[:2], options))
  for cache in jax.tree.leaves(runner.state.caches):
    assert {x.data.shape[1] for x in cache.addressable_shards} == {1}  # of two heads
  matrices = [x for x in jax.tree.leaves(model.base_decoding_params) if x.ndim == 2]
  assert all(2 * x.addressable_shards[0].data.size == x.size for x in matrices)
  # A pass sends activations: no cache, no matrix.
  (program,) = [v for k, v in runner._programs.items() if k[0] == "decode"]
  found = collectives.read(program.as_text())
  assert found and max(one.bytes for one in found) < 4 * 32 * 32


@pytest.mark.parametrize(
  "tensor, message",
  [(3, r"does not divide the model's heads \(4\)"), (4, r"key/value heads \(2\)"), (0, "heads")],
)
def test_a_model_that_cannot_be_shared_is_refused(directory, tensor, message):
  with pytest.raises(UserError, match=message):
    refine_jax.load(directory, tensor=tensor)
