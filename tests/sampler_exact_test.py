"""Exact block decoding against transformers' greedy decoding, in float32."""

import dataclasses
import functools
import itertools

import pytest
from hf_fixtures import tiny_hf_model
from sampler_fixtures import EOS, greedy, unequal_prompts

import refine_jax
from refine_jax.attention import cached, cached_triton
from refine_jax.decoding import settings as decoding
from refine_jax.decoding.drafts import KINDS

NEW = 20
BLOCKS = (1, 2, 3, 5, 8, 16, 32)
DRAFTS = ("tail", "noise", "ngram", "branches")
# Windows shorter than prompts, than blocks and than both together, on all layers or on one.
VARIANTS = {
  "llama": ("llama", {}),
  "qwen2": ("qwen2", {}),
  "qwen3": ("qwen3", {}),
  "mistral window": ("mistral", {"sliding_window": 5}),
  "qwen2 window": (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
  ),
}
# Batches that share a program run one after another: it is compiling that takes the time.
BATCHES = ((1,), (2,), (3, 4), (5, 6, 7, 8))


def cases():
  """(variant, block size, draft, batches): every pair of two factors' values occurs."""
  for (i, variant), (j, block) in itertools.product(enumerate(VARIANTS), enumerate(BLOCKS)):
    yield variant, block, DRAFTS[(i - j + j // 2) % 4], BATCHES[(i + j) % 4]


def more_cases(kinds):
  """A few for each draft kind that is not in DRAFTS."""
  for draft in kinds:
    if draft not in DRAFTS:
      yield "llama", 5, draft, BATCHES[2]
      yield "mistral window", 8, draft, BATCHES[0]
      yield "qwen2 window", 2, draft, BATCHES[1]


def test_the_cases_hold_every_pair_and_every_kind():
  factors = (tuple(VARIANTS), BLOCKS, DRAFTS, BATCHES)
  for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
    assert {(c[i], c[j]) for c in cases()} == set(itertools.product(first, second))
  kinds = [*KINDS, "a new one"]
  assert {c[2] for c in (*cases(), *more_cases(kinds))} == set(kinds)


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
  @functools.cache
  def make(name):
    """Our model, prompts of unequal lengths, and transformers' answers to them."""
    family, overrides = VARIANTS.get(name, (name, {}))
    directory, theirs = tiny_hf_model(
      family, tmp_path_factory.mktemp(family), num_hidden_layers=2, **overrides
    )
    batch = unequal_prompts(8, theirs.config.vocab_size)
    return refine_jax.load(directory), batch, [greedy(theirs, p, NEW) for p in batch]

  return make


@pytest.mark.parametrize("name, block, draft, batches", [*cases(), *more_cases(KINDS)])
def test_exact_is_transformers_greedy(variant, name, block, draft, batches):
  ours, prompts, want = variant(name)
  for rows in batches:
    chosen = [(rows + i) % 8 for i in range(rows)]
    out = refine_jax.generate(
      ours,
      [prompts[i] for i in chosen],
      block_size=block,
      draft=draft,
      max_new_tokens=NEW,
      eos_token_id=EOS,
    )
    assert out.tokens == [want[i] for i in chosen]
    assert all(len(t) / block <= p <= len(t) for p, t in zip(out.passes, out.tokens, strict=True))


@pytest.mark.parametrize(
  "name, block, draft, batches",
  [
    ("qwen3", 5, "branches", (3,)),
    ("mistral window", 1, "tail", (1,)),
    ("qwen2 window", 8, "tail", (4,)),
    ("mistral window", 4, "branches", (1,)),
  ],
)
def test_what_a_gpu_does_is_exact_too(variant, monkeypatch, name, block, draft, batches):
  """The kernel, interpreted, and passes that run over 16 tokens at least."""
  calls = []

  def attend(*new, **arguments):
    calls.append(new[0].shape[1])
    return cached_triton.attend(*new, **arguments, interpret=True)

  monkeypatch.setattr(cached, "choose_engine", lambda config, dtype: "kernel")
  monkeypatch.setattr(cached, "cached_triton", type("kernel", (), {"attend": attend}))
  monkeypatch.setattr(decoding, "least_window", lambda rows: 16 // rows)
  ours, prompts, want = variant(name)
  fresh = dataclasses.replace(ours)  # an engine once chosen stays
  test_exact_is_transformers_greedy(lambda _: (fresh, prompts, want), name, block, draft, batches)
  assert min(calls) >= 16 // max(batches)


def test_the_oracle_is_not_trivial(variant):
  """Answers that end by EOS and by the limit, EOS inside prompts, windows that matter."""
  answers = {name: variant(name)[2] for name in (*VARIANTS, "mistral")}
  every = [a for rows in answers.values() for a in rows]
  assert any(a[-1] == EOS and len(a) < NEW for a in every) and any(len(a) == NEW for a in every)
  assert any(EOS in p[:-1] for p in variant("llama")[1])
  assert len({len(p) for p in variant("llama")[1]}) > 4
  assert answers["mistral window"] != answers["mistral"]
  assert answers["qwen2 window"] != answers["qwen2"]
