"""The sampler's modes against their definitions, sampling, and the ends of rows."""

import dataclasses

import jax
import numpy as np
import pytest
import sampler_fixtures
from hf_fixtures import tiny_hf_model
from sampler_fixtures import EOS, greedy, unequal_prompts

import refine_jax
from refine_jax.decoding import generation, loading, pool

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """For each family transformers' model and ours; logits sharp enough that no two are near."""
  result = {}
  for family in FAMILIES:
    directory, theirs = tiny_hf_model(family, tmp_path_factory.mktemp(family))
    result[family] = theirs.float().eval(), refine_jax.load(directory)
  return result


def run(ours, rows, new=24, **options):
  return refine_jax.generate(ours, rows, max_new_tokens=new, eos_token_id=EOS, **options)


def document_loop(ours, prompt, new, block, refine_iter, eos=EOS):
  """Decodes one row in mode "fixed" as the method was first described: dense logits, no cache."""
  text, limit = list(prompt), len(prompt) + new
  passes = 0
  while True:
    draft = [eos] * (block - 1)
    for _ in range(refine_iter):
      logits = np.asarray(ours(np.array([text + draft])))[0]
      predicted = logits[len(text) - 1 :].argmax(-1).tolist()
      passes += 1
      settled = predicted[:-1] == draft
      draft = predicted[:-1]
      if settled:
        break
    for token in predicted:
      text.append(token)
      if token == eos or len(text) == limit:
        return text[len(prompt) :], passes


@pytest.mark.parametrize("refine_iter", [1, 2, 4])
def test_fixed_is_the_documents_loop(models, refine_iter):
  _, ours = models["qwen2"]
  batch = unequal_prompts(4, ours.config.vocab_size)
  out = run(ours, batch, new=18, mode="fixed", block_size=5, refine_iter=refine_iter)
  want = [document_loop(ours, p, 18, 5, refine_iter) for p in batch]
  assert out.tokens == [tokens for tokens, _ in want]
  assert out.passes == [passes for _, passes in want]


def test_fixed_with_as_many_passes_as_places_is_greedy(models):
  theirs, ours = models["mistral"]
  batch = unequal_prompts(3, ours.config.vocab_size)
  out = run(ours, batch, mode="fixed", block_size=6, refine_iter=6)
  assert out.tokens == [greedy(theirs, p, 24) for p in batch]


def test_threshold_one_is_exact_and_zero_takes_whole_blocks(models):
  theirs, ours = models["llama"]
  batch = unequal_prompts(3, ours.config.vocab_size)
  sure = run(ours, batch, mode="threshold", block_size=4, tau=1.1)
  assert sure.tokens == [greedy(theirs, p, 24) for p in batch]
  bold = run(ours, batch, mode="threshold", block_size=4, tau=0.0)
  assert bold.passes == [-(-len(t) // 4) for t in bold.tokens]


def threshold_loop(ours, prompt, new, block, tau):
  """Commits what is verified and one more, or what is likely, for one row and without a cache."""

  def predict(draft):
    ids = text + draft
    # Of one length, so that it is compiled once; what follows changes nothing.
    logits = ours(np.array([ids + [0] * (len(prompt) + new + block - len(ids))]))
    logits = logits[0, len(text) - 1 : len(ids)]
    likely = np.asarray(jax.nn.softmax(logits, axis=-1)).max(-1) >= tau
    return np.asarray(logits).argmax(-1).tolist(), likely

  text, passes = list(prompt), 0
  # The prompt's pass gives the first drafts.
  draft = predict([EOS] * (block - 1))[0][:-1]
  while True:
    predicted, likely = predict(draft)
    passes += 1
    verified = next((i for i in range(block - 1) if predicted[i] != draft[i]), block - 1)
    count = max(verified + 1, next((i for i in range(block) if not likely[i]), block))
    for token in predicted[:count]:
      text.append(token)
      if token == EOS or len(text) == len(prompt) + new:
        return text[len(prompt) :], passes
    draft = (predicted[count:] + [EOS] * count)[: block - 1]


@pytest.mark.parametrize("tau", [0.1, 0.2])
def test_threshold_is_its_definition(models, tau):
  theirs, ours = models["qwen3"]
  batch = unequal_prompts(4, ours.config.vocab_size)
  out = run(ours, batch, new=14, mode="threshold", block_size=5, tau=tau)
  want = [threshold_loop(ours, p, 14, 5, tau) for p in batch]
  assert out.tokens == [tokens for tokens, _ in want]
  assert out.passes == [passes for _, passes in want]
  assert out.tokens != [greedy(theirs, p, 14) for p in batch]


@pytest.fixture(scope="module")
def copier():
  return sampler_fixtures.copier_model()


def test_right_drafts_are_committed_together(copier):
  # The tail of a pass over EOS drafts is wrong; n-grams repeat a period, and the text has one.
  prompt = list(range(10)) * 2
  out = refine_jax.generate(copier, [prompt[:12]], block_size=8, draft="ngram", max_new_tokens=8)
  assert out.tokens == [[2, 3, 4, 5, 6, 7, 8, 9]]
  assert out.passes == [1] and out.tokens_per_pass == 8
  assert out.accepted == [1.0] * 8


def test_eos_ends_its_row_only_and_limits_are_kept(copier):
  rows = [[35], [1], [38], [37, 39, 20]]
  out = refine_jax.generate(copier, rows, block_size=4, max_new_tokens=6)
  assert out.tokens == [[36, 37, 38, 39], [2, 3, 4, 5, 6, 7], [39], [21, 22, 23, 24, 25, 26]]
  assert out.stopped == [True, False, True, False]


def test_the_models_length_is_never_overshot(copier):
  short = dataclasses.replace(copier, config=dataclasses.replace(copier.config, max_length=9))
  out = refine_jax.generate(short, [[1, 2, 3]], block_size=4, max_new_tokens=50)
  assert out.tokens == [[4, 5, 6, 7, 8, 9]]
  with pytest.raises(refine_jax.UserError, match="leaves no room"):
    refine_jax.generate(short, [list(range(9))], max_new_tokens=1)


def test_a_row_does_not_depend_on_its_company(models):
  _, ours = models["qwen3"]
  batch = unequal_prompts(5, ours.config.vocab_size)
  options = {"mode": "exact", "block_size": 4, "temperature": 1.0, "seed": 7}
  together = run(ours, batch, **options).tokens
  assert together[:2] == run(ours, batch[:2], **options).tokens


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}])
def test_sampling_in_blocks_is_sampling_one_by_one(models, options):
  _, ours = models["llama"]
  batch = unequal_prompts(4, ours.config.vocab_size)
  sampled = {"temperature": 0.8, "seed": 3, "new": 12} | options
  blocks = run(ours, batch, mode="exact", block_size=5, **sampled)
  one_by_one = run(ours, batch, mode="ar", **sampled)
  assert blocks.tokens == one_by_one.tokens
  assert blocks.tokens != run(ours, batch, mode="exact", **(sampled | {"seed": 4})).tokens


def test_iterative_generate_has_the_documents_shape(copier):
  out = refine_jax.iterative_generate(
    copier,
    np.array([[1, 2], [36, 37]]),
    eos_token_id=39,
    pad_token_id=0,
    max_new_tokens=5,
    add_eos_length=3,
    refine_iter=4,
  )
  np.testing.assert_array_equal(out, [[1, 2, 3, 4, 5, 6, 7], [36, 37, 38, 39, 0, 0, 0]])


@pytest.mark.parametrize("refine_iter", [1, 3])
def test_iterative_generate_is_the_documents_loop(models, refine_iter):
  """Rows of one length, filled up with padding after their EOS."""
  _, ours = models["llama"]
  prompts = np.random.default_rng(0).integers(0, ours.config.vocab_size, (6, 5))
  eos = 46  # this model says it now and then
  out = refine_jax.iterative_generate(
    ours,
    prompts,
    eos_token_id=eos,
    pad_token_id=7,
    max_new_tokens=40,
    add_eos_length=4,
    refine_iter=refine_iter,
  )
  want = [document_loop(ours, p.tolist(), 40, 5, refine_iter, eos)[0] for p in prompts]
  width = max(map(len, want))
  assert min(map(len, want)) < width
  padded = [[*p, *t, *[7] * (width - len(t))] for p, t in zip(prompts, want, strict=True)]
  np.testing.assert_array_equal(out, padded)


def test_without_a_tokenizer_text_is_refused_and_ids_are_not(copier):
  with pytest.raises(refine_jax.UserError, match="no tokenizer"):
    refine_jax.generate(copier, ["hello"])
  assert refine_jax.generate(copier, [[1]], max_new_tokens=1).texts is None


def test_a_second_call_compiles_nothing(models):
  _, ours = models["llama"]
  run(ours, [[5, 6, 7]], block_size=3)
  assert run(ours, [[7, 8, 9]], block_size=3).compile_seconds == 0


@pytest.mark.parametrize(
  "options, message",
  [({"mode": "fast"}, "mode"), ({"draft": "none"}, "draft"), ({"block_size": 0}, "block_size")],
)
def test_wrong_options_say_what_is_possible(copier, options, message):
  with pytest.raises(refine_jax.UserError, match=message):
    refine_jax.generate(copier, [[1]], **options)


def test_no_prompts_give_no_answers(copier):
  assert refine_jax.generate(copier, []).tokens == []
  assert generation.generate(copier, []).tokens_per_pass == 0


def test_what_a_model_was_trained_with_is_the_default(monkeypatch):
  """The noise token and the block size; drafts in branches are smaller for many rows."""
  copier = sampler_fixtures.copier_model()
  trained = dataclasses.replace(copier, refinement=loading.Refinement(noise_token=2, block_size=16))
  seen, take = [], pool.take

  def spy(model, requests, slots):
    seen.append((take(model, requests, slots).settings, requests[0].noise_token))
    return take(model, requests, slots)

  monkeypatch.setattr(pool, "take", spy)

  def settings(model, rows=1, mode="exact", draft=None):
    refine_jax.generate(model, [[3, 5, 7]] * rows, mode=mode, draft=draft, max_new_tokens=2)
    return seen[-1][0]

  plain, alone = settings(copier), settings(trained)
  assert (plain.block, plain.draft) == (1, "tail")  # it has no drafts to offer
  assert (alone.block, alone.draft) == (8, "budget") and alone.plans[0].draft == "ar"
  assert [noise for _, noise in seen] == [copier.eos_token_ids[0], 2]
  asked = (("exact", "branches"), ("threshold", None), ("fixed", None))
  many = {mode: settings(trained, 32, mode, draft) for mode, draft in asked}
  assert {mode: (s.block, s.draft) for mode, s in many.items()} == {
    "exact": (8, "branches"),
    "threshold": (16, "branches"),
    "fixed": (16, "noise"),
  }


def test_threshold_goes_on_in_the_branch_of_what_was_verified():
  """A copier is sure of everything: it commits the branch too, and nothing after it."""
  copier, prompt = sampler_fixtures.copier_model(), [3]
  # After noise too comes its successor, so drafts after it are wrong, and their tokens' count says
  # which pass they were committed in.
  exact = refine_jax.generate(copier, [prompt], draft="branches", block_size=4, max_new_tokens=12)
  sure = refine_jax.generate(
    copier,
    [prompt],
    mode="threshold",
    tau=0.0,
    draft="branches",
    block_size=4,
    max_new_tokens=12,
    trace=True,
  )
  ar = refine_jax.generate(copier, [prompt], mode="ar", max_new_tokens=12)
  assert exact.tokens == ar.tokens
  # The prompt's pass gave one right draft; the first pass commits it, the token after it, and the
  # branch of 3 after that.
  noise = copier.eos_token_ids[0]
  assert sure.tokens[0][:2] == ar.tokens[0][:2]
  assert sure.tokens[0][2:5] == [(noise + 1) % 40] * 3
  first = sure.trace.rows[0][0].committed
  assert first == 5 and sure.passes[0] <= 3
