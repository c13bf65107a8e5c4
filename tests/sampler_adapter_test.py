"""Decoding with a gated adapter: the text is the base's, whatever the adapter is."""

import dataclasses
import functools

import hf_fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_fixtures import random_adapter
from sampler_fixtures import EOS, copier_model, greedy, unequal_prompts

import refine_jax
from refine_jax.hf.generation_config import Refinement
from refine_jax.model import adapters

NEW = 16
NOISE = 7


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
  @functools.cache
  def make(family):
    """Our model with an adapter, the base alone, prompts, and transformers' answers to them."""
    place = tmp_path_factory.mktemp(family)
    directory, theirs = hf_fixtures.tiny_hf_model(family, place, num_hidden_layers=2)
    base = refine_jax.load(directory)
    model = dataclasses.replace(base, adapter=random_adapter(base.config))
    prompts = unequal_prompts(3, theirs.config.vocab_size)
    return model, base, prompts, [greedy(theirs, p, NEW) for p in prompts]

  return make


def generate(model, prompts, **options):
  options = {"max_new_tokens": NEW, "eos_token_id": EOS, "noise_token": NOISE} | options
  return refine_jax.generate(model, prompts, **options)


CASES = [
  ("llama", 4, "branches"),
  ("llama", 8, "noise"),
  ("mistral", 2, "branches"),
  ("qwen2", 8, "branches"),
  ("qwen3", 4, "branches"),
  ("qwen3", 8, "tail"),
  ("gemma3_text", 4, "branches"),
]


def test_the_cases_hold_every_family():
  assert {family for family, *_ in CASES} == set(hf_fixtures.FAMILIES)


@pytest.mark.parametrize(("family", "block", "draft"), CASES)
def test_exact_with_an_adapter_is_greedy_transformers_of_the_base(gated, family, block, draft):
  model, _, prompts, want = gated(family)
  assert generate(model, prompts, block_size=block, draft=draft).tokens == want


def test_an_adapter_makes_other_drafts(gated):
  model, base, prompts, _ = gated("llama")
  options = {"block_size": 4, "draft": "branches", "trace": True}
  ours, theirs = (generate(m, prompts, **options) for m in (model, base))

  def drafts(out):
    return [[seen.tokens for seen in row] for row in out.trace.rows]

  assert ours.tokens == theirs.tokens and drafts(ours) != drafts(theirs)


def test_samples_of_exact_are_those_of_the_base_alone(gated):
  model, base, prompts, _ = gated("llama")
  options = {"temperature": 0.8, "seed": 5}
  ours = generate(model, prompts, block_size=4, draft="branches", **options)
  assert ours.tokens == generate(base, prompts, mode="ar", **options).tokens


def test_threshold_and_fixed_run_with_an_adapter(gated):
  model, base, prompts, want = gated("llama")
  out = generate(model, prompts, mode="threshold", tau=1.1, block_size=4, draft="branches")
  assert out.tokens == want  # nothing is that sure
  out = generate(model, prompts, mode="threshold", tau=0.0, block_size=4, draft="branches")
  assert out.tokens_per_pass > 2 and all(out.tokens)


def test_a_noise_token_that_is_right_is_not_taken_for_text():
  """The copier says i + 1 after i. Noise 7 stands where 7 is right, and says something else."""
  base = copier_model()
  unit = jax.tree_util.tree_map_with_path(
    lambda path, x: x + (path[-1].key == "scale"), base.params["layers"]
  )
  base = dataclasses.replace(base, params=base.params | {"layers": unit})
  model = dataclasses.replace(base, adapter=random_adapter(base.config, alpha=300.0))
  options = {"draft": "noise", "block_size": 3, "eos_token_id": (), "max_new_tokens": 8}
  ours, alone = (generate(m, [[4], [5], [6]], **options) for m in (model, base))
  assert ours.tokens == alone.tokens == [list(range(i + 1, i + 9)) for i in (4, 5, 6)]
  assert sum(alone.passes) < sum(ours.passes)  # the base alone does take it


@pytest.mark.parametrize("draft", ["branches", "tail"])
def test_noise_of_any_id_changes_drafts_and_not_the_text(gated, draft):
  model, _, prompts, want = gated("llama")
  fixed = Refinement(noise_token=NOISE, block_size=4)
  options = {"noise_token": None, "draft": draft, "trace": True}
  outs = [
    generate(dataclasses.replace(model, refinement=trained), prompts, **options)
    for trained in (fixed, dataclasses.replace(fixed, random_noise=True))
  ]
  assert [out.tokens for out in outs] == [want, want]
  first, second = ([[seen.tokens for seen in row] for row in out.trace.rows] for out in outs)
  assert first != second


def test_comparing_with_ar_compares_with_the_base_alone(gated, monkeypatch):
  model, base, prompts, want = gated("llama")
  fresh = dataclasses.replace(model)
  comparison = refine_jax.compare_with_ar(
    fresh, prompts, max_new_tokens=NEW, eos_token_id=EOS, block_size=4, draft="branches"
  )
  assert comparison.equal and comparison.ar.tokens == want
  held = [
    set(params["layers"][0]["mlp"]["down"])
    for params in (fresh.decoding_params(1), fresh.base_decoding_params, base.decoding_params(1))
  ]
  assert held == [{"kernel_a", "b"}, {"kernel"}, {"kernel"}]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_projections_in_pairs_do_what_factors_do(gated, family, monkeypatch):
  model, _, prompts, want = gated(family)
  factored = generate(model, prompts, trace=True, draft="branches")
  joined = frozenset({"qkv", "output", "gate_up", "down"})
  monkeypatch.setattr(adapters, "faster_paired", lambda layer, tokens: joined)
  fresh = dataclasses.replace(model)
  paired = generate(fresh, prompts, trace=True, draft="branches")
  paths = jax.tree_util.tree_leaves_with_path(fresh.decoding_params(1)["layers"])
  held = {path[-1].key for path, _ in paths}
  assert "kernel_pair" in held and not held & {"kernel", "kernel_a", "a", "b"}
  assert paired.tokens == factored.tokens == want
  assert paired.passes == factored.passes
  for ours, theirs in zip(paired.trace.rows, factored.trace.rows, strict=True):
    for a, b in zip(ours, theirs, strict=True):
      assert a.tokens == b.tokens
      np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-4)


def test_pairs_are_for_small_matrices_and_few_tokens(monkeypatch):
  def kernel(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16), "a": None, "b": None}

  layer = {
    "attention": {"qkv": kernel(1536, 2048), "output": {"kernel": None}},
    "mlp": {"gate_up": kernel(1536, 17920)},
  }
  assert adapters.faster_paired(layer, 1) == frozenset()  # no GPU
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert adapters.faster_paired(layer, 256) == {"qkv"}
  assert adapters.faster_paired(layer, 4096) == frozenset()
