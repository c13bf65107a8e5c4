"""Gemma 3, the family that needs most of the model's fields: trained, decoded, written."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_fixtures
import sampler_test
import torch
import train_fixtures as tiny
import transformers
from hf_fixtures import random_ids, tiny_hf_model

import refine_jax
from refine_jax import sharding
from refine_jax.config import MeshConfig
from refine_jax.decoding import loading
from refine_jax.hf import export as hf_export
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.families import FAMILIES
from refine_jax.model import transformer
from refine_jax.training import optim, train_step

NEW = 14


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  directory, theirs = tiny_hf_model(
    "gemma3_text", tmp_path_factory.mktemp("gemma3"), num_hidden_layers=2
  )
  return directory, theirs, refine_jax.load(directory)


@pytest.fixture(scope="module")
def answers(models):
  """Prompts of unequal lengths and transformers' greedy answers, longer than the window."""
  _, theirs, _ = models
  batch = sampler_fixtures.unequal_prompts(3, theirs.config.vocab_size)
  want = [sampler_fixtures.greedy(theirs, p, NEW) for p in batch]
  assert max(map(len, want)) == NEW > theirs.config.sliding_window
  assert len({token for answer in want for token in answer}) > 4
  return batch, want


@pytest.mark.parametrize(
  "options",
  [
    {"mode": "ar"},
    {"mode": "exact", "block_size": 4, "draft": "branches"},
    {"mode": "exact", "block_size": 8, "draft": "tail"},
    {"mode": "fixed", "block_size": 4, "refine_iter": 4},
  ],
  ids=str,
)
def test_greedy_text_is_that_of_transformers(models, answers, options):
  batch, want = answers
  assert sampler_test.run(models[2], batch, new=NEW, **options).tokens == want


def test_fixed_is_the_documents_loop(models, answers):
  ours, batch = models[2], answers[0][:1]
  out = sampler_test.run(ours, batch, new=9, mode="fixed", block_size=5, refine_iter=2)
  want = [sampler_test.document_loop(ours, p, 9, 5, 2) for p in batch]
  assert list(zip(out.tokens, out.passes, strict=True)) == want


def test_gradients_of_every_tensor_are_those_of_transformers(models):
  _, theirs, ours = models
  ids = random_ids((2, 16))
  theirs.zero_grad()
  theirs(torch.from_numpy(ids).long(), labels=torch.from_numpy(ids).long()).loss.backward()

  @jax.grad
  def gradients(params):
    states = loading.hidden_states(params, ours.config, ids, jnp.ones_like(ids))
    log_probs = jax.nn.log_softmax(transformer.logits(params, states)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs, jnp.asarray(ids)[:, 1:, None], axis=2))

  family = FAMILIES["gemma3_text"]
  got = dict(hf_weights.tensors(jax.jit(gradients)(ours.params), ours.config, family))
  want = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, atol=1e-5 * np.abs(x).max(), rtol=1e-3, err_msg=name)


def test_embeddings_are_scaled_and_rounded_as_transformers_does_it(tmp_path):
  directory, theirs = tiny_hf_model("gemma3_text", tmp_path, dtype=torch.bfloat16)
  ours, ids = refine_jax.load(directory), random_ids((2, 30))
  got = transformer.embed(ours.params, ours.config, ids, jnp.bfloat16)
  want = theirs.model.embed_tokens(torch.from_numpy(ids).long()).detach().float().numpy()
  np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_a_training_step_lowers_the_loss():
  """In packed rows; in bfloat16, whose working copy leaves the norms in float32."""
  config = tiny.tiny_config(**tiny.GEMMA3)
  forward = tiny.forward(config, dtype="bfloat16")
  step_config = tiny.step_config(num_iterations=1, lr=1e-2, warmup_ratio=0.0)
  step = train_step.jit_train_step(step_config, forward)
  state = train_step.init_state(tiny.tiny_params(config), step_config.optim)
  batch = jax.tree.map(lambda x: x[None], tiny.packed_batch())
  losses = []
  for _ in range(3):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss_total"]))
  assert losses[-1] < losses[0]


def test_norms_start_as_the_identity_are_not_decayed_and_not_split():
  params = transformer.init_params(tiny.tiny_config(**tiny.GEMMA3), jax.random.key(0))
  layers = params["layers"]
  assert {"attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"} < layers.keys()
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
  placed, decays = sharding.shardings(params, mesh), optim.decays(params)
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key == "scale":
      at = functools.partial(functools.reduce, lambda tree, key: tree[key.key], path)
      assert not x.any() and not at(decays) and at(placed).is_fully_replicated


def test_an_export_has_the_ropes_of_both_layer_types_in_both_spellings(models, tmp_path):
  directory, theirs, ours = models
  values = json.loads((directory / "config.json").read_text())
  scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e5}
  values["rope_parameters"]["full_attention"] = scaled
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "config.json").write_text(json.dumps(values))
  output = hf_export.export(ours.params, tmp_path / "in", tmp_path / "out", dtype="float32")
  written = json.loads((output / "config.json").read_text())
  new = written.pop("rope_parameters")
  assert new["full_attention"] == scaled
  assert new["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
  assert (written["rope_theta"], written["rope_local_base_freq"]) == (2e5, 1e4)
  assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
  # transformers' own reading of the old spelling, without the new one
  (output / "config.json").write_text(json.dumps(written))
  read = transformers.AutoConfig.from_pretrained(output).rope_parameters
  assert read == new
