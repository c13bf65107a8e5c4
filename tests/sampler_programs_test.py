"""Which calls compile a program, how many are kept, and logits that say nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_fixtures
import train_fixtures as tiny

import refine_jax
from refine_jax.decoding import comparison, generation, loading, programs
from refine_jax.errors import UserError

EOS, DAMAGED = sampler_fixtures.EOS, 9


@pytest.fixture(scope="module")
def model():
  config = tiny.tiny_config(layers=1)
  return loading.Model(config, tiny.tiny_params(config), None, (EOS,), None, "tiny")


@pytest.fixture(scope="module")
def damaged(model):
  """One token's embedding is not finite: only rows that hold it say nothing."""
  embedding = model.params["embedding"].at[DAMAGED].set(jnp.nan)
  return dataclasses.replace(model, params=model.params | {"embedding": embedding})


def generate(model, prompts=((5, 6, 7), (3, 4, 5)), **options):
  options = {"max_new_tokens": 6, "block_size": 3} | options
  return refine_jax.generate(model, [list(p) for p in prompts], **options)


@pytest.mark.parametrize(
  "options, name, values",
  [
    ({}, "temperature", (0.5, 0.75, 1.5)),
    ({"temperature": 1.0}, "top_p", (0.5, 0.9, 0.95)),
    ({"temperature": 1.0}, "top_k", (5, 6, 8)),
    ({"mode": "threshold"}, "tau", (0.1, 0.2, 2)),
    ({"mode": "fixed"}, "refine_iter", (1, 2, 3)),
  ],
)
def test_a_new_value_compiles_nothing(model, options, name, values):
  first, *rest = (generate(model, **options, **{name: value}) for value in values)
  assert all(out.compile_seconds == 0 for out in rest)
  # And it counts: what the first value gives is not what another gives.
  assert any(out.tokens != first.tokens or out.passes != first.passes for out in rest)


def test_programs_are_kept_by_their_last_use(monkeypatch):
  monkeypatch.setattr(programs, "MOST_PROGRAMS", 2)
  monkeypatch.setattr(programs, "_PROGRAMS", type(programs._PROGRAMS)())
  function = jax.jit(lambda x: x + 1)

  def is_new(size):
    _, new, seconds = programs.compiled(programs.Job(function, (np.zeros(size),)))
    assert (seconds > 0) == new
    return new == 1

  assert [is_new(size) for size in (1, 2, 1, 3, 1, 2)] == [True, True, False, True, False, True]
  assert len(programs._PROGRAMS) == 2


def test_another_matmul_precision_is_another_program():
  function, x = jax.jit(lambda x: x @ x), np.ones((4, 4), np.float32)
  job = programs.Job(function, (x,))
  (plain,), _, _ = programs.compiled(job)
  with jax.default_matmul_precision("bfloat16"):
    (other,), new, _ = programs.compiled(job)
  assert other is not plain and new == 1
  assert programs.compiled(job) == ([plain], 0, 0.0)


@pytest.mark.parametrize(
  "options",
  [
    {"mode": "exact"},
    {"mode": "exact", "draft": "branches"},
    {"mode": "exact", "temperature": 0.7, "top_k": 4, "top_p": 0.8},
    {"mode": "threshold", "tau": 0.1},
    {"mode": "fixed"},
    {"mode": "ar"},
    {"mode": "exact", "trace": True},
  ],
  ids=str,
)
def test_rows_whose_logits_are_not_finite_are_named(damaged, model, options):
  options = options | {"block_size": 1 if options["mode"] == "ar" else 3}
  good, bad = (5, 6, 7), (5, DAMAGED, 7)
  with pytest.raises(UserError, match=r"not finite .* in prompt 12, 13, .*after 0 tokens.*float32"):
    generate(damaged, (good, bad, bad), first_row=10, **options)
  alone = generate(damaged, (good,), **options)
  assert alone.tokens == generate(model, (good,), **options).tokens


def test_an_attempt_keeps_the_rows_beside_one_that_is_not_finite(damaged, model):
  good, bad = [5, 6, 7], [5, DAMAGED, 7]
  options = {"max_new_tokens": 6, "block_size": 3}
  out = generation.attempt(damaged, [bad, good, bad], slots=2, **options)
  assert out.not_finite == [0, 2] and out.tokens[0] == []
  assert out.tokens[1] == generate(model, (good,)).tokens[0]
  with pytest.raises(UserError, match="not finite .* in prompt 1, 2, "):
    generation.attempt(damaged, [bad, bad], **options)


def test_an_infinite_best_logit_is_not_finite(model):
  params = model.params | {"head": model.params["head"].at[4].set(jnp.inf)}
  with pytest.raises(UserError, match="not finite"):
    generate(dataclasses.replace(model, params=params))


def test_a_comparison_names_logits_that_are_not_finite(damaged):
  with pytest.raises(UserError, match="in prompt 2"):
    refine_jax.compare_with_ar(damaged, [[5, 6], [5, DAMAGED]], max_new_tokens=3, block_size=3)
  with pytest.raises(UserError, match="not finite after 2 tokens"):
    comparison._difference(damaged, [5, DAMAGED], [4], [6])
