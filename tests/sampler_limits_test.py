"""Where rows end, at the edges of what a model and a caller allow; and what a sample depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_fixtures
import scipy.special
import scipy.stats
import train_fixtures as tiny

import refine_jax
from refine_jax.decoding import loading, sampling
from refine_jax.errors import UserError

MODES = ("exact", "fixed", "threshold", "ar")
CONTEXT = 24


@pytest.fixture(scope="module")
def copier():
  """Says 1, 2, 3, .. after 0, in no more than 24 positions; 39 is its EOS."""
  model = sampler_fixtures.copier_model()
  return dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=CONTEXT))


@pytest.mark.parametrize("new", [1, 50])
@pytest.mark.parametrize("block", [5, 32])
@pytest.mark.parametrize("mode", MODES)
def test_budgets_and_the_models_length_hold_for_each_row(copier, mode, block, new):
  """Prompts that leave one place, two and many; alone and eight together."""
  lengths = [CONTEXT - 1, 1, CONTEXT - 2, 9, CONTEXT - 5, 3, 16, 2]
  prompts = [[4] * (length - 1) + [1] for length in lengths]
  # tau: never sure, so that a threshold commits only what is verified.
  options = {"mode": mode, "block_size": block, "max_new_tokens": new, "tau": 1.1}
  together = refine_jax.generate(copier, prompts, **options)
  rooms = [min(new, CONTEXT - length) for length in lengths]
  assert [len(tokens) for tokens in together.tokens] == rooms
  assert not any(together.stopped)
  if mode != "fixed":
    assert together.tokens == [list(range(2, 2 + room)) for room in rooms]
  for row in (0, 1):
    alone = refine_jax.generate(copier, [prompts[row]], **options)
    assert (alone.tokens[0], alone.passes[0]) == (together.tokens[row], together.passes[row])


def test_a_budget_has_no_greatest_number(copier):
  out = refine_jax.generate(copier, [[1]], max_new_tokens=2**31 - 1)
  assert len(out.tokens[0]) == CONTEXT - 1
  assert refine_jax.generate(copier, [[1]], max_new_tokens=2**40).tokens == out.tokens


@pytest.mark.parametrize(
  "option",
  [
    {"block_size": 0},
    {"block_size": 2.5},
    {"block_size": 2**31},
    {"max_new_tokens": 0},
    {"refine_iter": 1.5},
    {"top_k": 2.5},
    {"top_k": -1},
    {"seed": 0.5},
    {"first_row": -1},
    {"first_row": 2**40},
    {"stream": -1},
    {"stream": 2.5},
    {"mode": "best"},
    {"draft": "none"},
    {"tau": -1},
    {"temperature": -1},
    {"top_p": 0},
    {"noise_token": [1]},
    {"noise_token": "x"},
  ],
  ids=str,
)
def test_an_option_that_cannot_be_is_named(copier, option):
  (name,) = option
  with pytest.raises(UserError, match=f"^{name}=.* cannot be"):
    refine_jax.generate(copier, [[1]], **({"max_new_tokens": 3} | option))


def test_prompts_come_in_any_list(copier):
  want = refine_jax.generate(copier, [[1, 2]], max_new_tokens=3, stop=None).tokens
  for prompts in (np.array([[1, 2]]), jnp.array([[1, 2]]), iter([[1, 2]]), [jnp.array([1, 2])]):
    assert refine_jax.generate(copier, prompts, max_new_tokens=3).tokens == want
  for prompts in ("text", b"text", {"role": "user", "content": "text"}, None, 3):
    with pytest.raises(UserError, match="^prompts is .* give a list"):
      refine_jax.generate(copier, prompts)


@pytest.mark.parametrize(
  "prompt",
  [b"\1\2", bytearray(b"\1"), memoryview(b"\1"), [True, False], np.array([True])],
  ids=lambda prompt: type(prompt).__name__,
)
def test_bytes_and_truth_values_are_no_token_ids(copier, prompt):
  with pytest.raises(UserError, match="^Prompt 1 (is|mixes) "):
    refine_jax.generate(copier, [prompt], max_new_tokens=3)


@pytest.mark.parametrize("ids", [[[1], [1, 2]], ["x"], [None], [1.5]])
def test_odd_ids_of_eos_are_one_line(copier, ids):
  with pytest.raises(UserError, match="^eos_token_id has .* no token id"):
    refine_jax.generate(copier, [[1]], max_new_tokens=3, eos_token_id=ids)


@pytest.mark.parametrize("ids", [[1, 2], 3, [[1], [1, 2]], [[[1]]]])
def test_logits_are_of_rows_of_one_length(copier, ids):
  with pytest.raises(UserError, match=r"^ids must be \[B, T\]"):
    copier(ids)


@pytest.mark.parametrize("dtype", ["float64", float, "float8_e4m3fn", "int8", "bf16", 3])
def test_a_dtype_that_nothing_is_computed_in_is_refused(dtype):
  with pytest.raises(UserError, match="is none of float32, bfloat16, float16"):
    refine_jax.load("nowhere", dtype=dtype)
  with pytest.raises(UserError, match="^tensor=.* must be a whole number"):
    refine_jax.load("nowhere", tensor="2")


def test_models_of_one_shape_may_lie_on_different_devices(copier):
  want = refine_jax.generate(copier, [[1, 2]], max_new_tokens=3).tokens
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  for place in (jax.devices()[1], everywhere):
    moved = dataclasses.replace(copier, params=jax.device_put(copier.params, place))
    assert refine_jax.generate(moved, [[1, 2]], max_new_tokens=3).tokens == want


@pytest.mark.parametrize("temperature", [1e-3, 1e-38])
def test_a_sample_without_warmth_is_greedy(copier, temperature):
  out = refine_jax.generate(copier, [[1]], max_new_tokens=5, temperature=temperature)
  assert out.tokens == [[2, 3, 4, 5, 6]]


def test_a_gpu_reads_the_logits_once_for_what_two_kernels_say():
  """The first of equal logits, far ones, and rows that say nothing."""
  logits = 5 * np.random.default_rng(0).normal(size=(3, 6, 301)).astype(np.float32)
  logits[0, 0, [17, 200]] = 40
  logits[0, 1], logits[0, 2, :150], logits[0, 3] = 3.0, -np.inf, logits[0, 3] * 1e30
  logits[1, 0, 5], logits[1, 1, 7], logits[1, 2] = np.nan, np.inf, -np.inf
  token, probability = jax.jit(sampling._greedy)(logits)
  found, sure = jax.jit(sampling._greedy_in_one)(logits)
  np.testing.assert_array_equal(found, token)
  assert np.sum(np.asarray(token) == sampling.NOT_FINITE) == 3 and token[0, 0] == 17
  said = np.asarray(token) >= 0
  np.testing.assert_allclose(sure[said], probability[said], rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_any_of_several_eos_ends_a_row(copier, mode):
  prompts = [[1], [4], [8], [39, 7, 39, 2]]
  options = {"mode": mode, "block_size": 1, "max_new_tokens": 8, "eos_token_id": [7, 11, 39]}
  out = refine_jax.generate(copier, prompts, **options)
  assert out.tokens == [[2, 3, 4, 5, 6, 7], [5, 6, 7], [9, 10, 11], [3, 4, 5, 6, 7]]
  assert out.stopped == [True] * 4
  none = refine_jax.generate(copier, [[37]], **(options | {"eos_token_id": []}))
  assert none.tokens == [[38, 39, *none.tokens[0][2:]]] and len(none.tokens[0]) == 8


def test_the_numbers_counted_by_hand(copier):
  """Two tokens before say how the text goes on, which is right up to where it starts over."""
  prompt = [0, 1, 2, 3, 4, 5, 0, 1]
  options = {"block_size": 4, "max_new_tokens": 6, "draft": "ngram", "trace": True}
  out = refine_jax.generate(copier, [prompt, [20]], **options)
  counts = [[seen.committed for seen in row] for row in out.trace.rows]
  # 2 3 4 5 are in the prompt. There 4 5 went on with 0, and not with 6; 5 6 is new.
  assert counts[0] == [4, 1, 1]
  assert out.passes == list(map(len, counts)) and list(map(sum, counts)) == [6, 6]
  passes = sum(out.passes)
  flat = [count for row in counts for count in row]
  assert out.accepted == [sum(c > offset for c in flat) / passes for offset in range(4)]
  assert out.tokens_per_pass == 12 / passes
  assert out.tokens_per_second == 12 / out.decode_seconds


@pytest.fixture(scope="module")
def sampled():
  config = tiny.tiny_config(vocab_size=6)
  return loading.Model(config, tiny.tiny_params(config), None, (), None, "tiny")


@pytest.mark.parametrize("mode", ["exact", "threshold"])
def test_a_sample_is_its_seeds_and_places_alone(sampled, mode):
  """Not of the batch's size, its longest prompt, the budget or the calls it came in."""
  prompts = [[1, 3], [2], [5, 0, 1], [4, 4], [0]]
  options = {"mode": mode, "temperature": 1.0, "seed": 7, "block_size": 3, "tau": 0.4}

  def tokens(prompts, **changes):
    changes = {"max_new_tokens": 9} | changes
    return refine_jax.generate(sampled, prompts, **(options | changes)).tokens

  want = tokens(prompts)
  assert tokens(prompts[:2]) == want[:2]
  assert tokens([*prompts[:3], [3] * 20, *prompts[4:], [1] * 33, [2], [3], [4]])[:3] == want[:3]
  assert [t[:9] for t in tokens(prompts, max_new_tokens=40)] == want
  assert tokens(prompts[:3]) + tokens(prompts[3:], first_row=3) == want
  assert tokens([prompts[3]], first_row=3) == want[3:4]
  assert tokens([prompts[0]] * 5) != [want[0]] * 5  # rows are not each other's copies
  assert tokens(prompts, seed=8) != want


def allowed(logits, *, temperature, top_k=0, top_p=1.0):
  """The distribution in numpy: [.., V]."""
  p = scipy.special.softmax(np.asarray(logits, np.float64) / temperature, axis=-1)
  order = np.argsort(-p, axis=-1)
  sorted_p = np.take_along_axis(p, order, axis=-1)
  kept = np.ones_like(sorted_p, bool)
  if top_k:
    kept[..., top_k:] = False
  sorted_p = np.where(kept, sorted_p, 0) / np.sum(sorted_p * kept, axis=-1, keepdims=True)
  kept &= np.cumsum(sorted_p, axis=-1) - sorted_p < top_p
  sorted_p = np.where(kept, sorted_p, 0)
  np.put_along_axis(p, order, sorted_p / sorted_p.sum(axis=-1, keepdims=True), axis=-1)
  return p


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": 1.0},
    pytest.param({"temperature": 2.0, "top_k": 4}, marks=pytest.mark.slow),
    pytest.param({"temperature": 1.5, "top_p": 0.8}, marks=pytest.mark.slow),
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
  ],
  ids=str,
)
# Samples in blocks are those of one token a pass whatever the draft kind (sampler_test).
@pytest.mark.parametrize(
  "draft", ["tail", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ngram", "budget"))]
)
def test_pairs_of_tokens_follow_the_models_distribution(sampled, options, draft):
  """Chi-square of what one block commits against the product of the model's conditionals."""
  prompt, count = [1, 3, 1, 3], 2048
  out = refine_jax.generate(
    sampled, [prompt] * count, slots=256, block_size=3, max_new_tokens=3, draft=draft, **options
  )
  assert sum(out.passes) < 3 * count  # some drafts were right, so blocks were committed
  logits = np.asarray(sampled(np.array([[*prompt, a, b] for a in range(6) for b in range(6)])))
  first, second, third = (
    allowed(logits[:, len(prompt) - 1 + place], **options) for place in range(3)
  )
  pairs = np.array([(a, b) for a in range(6) for b in range(6)])
  two = first[0][pairs[:, 0]] * np.take_along_axis(second, pairs[:, 1:], axis=1)[:, 0]
  want = count * (two[:, None] * third).ravel()
  seen = np.bincount([36 * a + 6 * b + c for a, b, c in out.tokens], minlength=216)
  assert not seen[want == 0].any()
  common = want >= 5  # the rare ones together, as the statistic is only then a chi-square
  seen = np.append(seen[common], seen[~common].sum())
  want = np.append(want[common], want[~common].sum())
  seen, want = seen[want > 0], want[want > 0]
  chi_square = np.sum((seen - want) ** 2 / want)
  assert chi_square < scipy.stats.chi2.ppf(0.999, len(want) - 1)
