"""Attention over a cache, against attention over whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny

from refine_jax.attention import cached, cached_triton
from refine_jax.batch import Batch
from refine_jax.decoding import drafts, programs, sampler
from refine_jax.decoding import settings as sampler_settings
from refine_jax.decoding import state as state_lib
from refine_jax.model import layout

PLACES = 32


def by_numpy(q_THh, k_SKh, v_SKh, window):
  groups = q_THh.shape[1] // k_SKh.shape[1]
  k, v = (np.repeat(x, groups, axis=1) for x in (k_SKh, v_SKh))
  scores = np.einsum("thd,shd->hts", q_THh, k) / np.sqrt(q_THh.shape[-1])
  distance = np.arange(len(q_THh))[:, None] - np.arange(len(k))[None, :]
  seen = (distance >= 0) & (distance < (window or len(k)))
  weights = np.exp(np.where(seen, scores, -np.inf))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("hts,shd->thd", weights, v)


@pytest.fixture(params=["xla", "kernel"])
def engine(request, monkeypatch):
  interpreted = functools.partial(cached_triton.attend, interpret=True)
  monkeypatch.setattr(cached_triton, "attend", interpreted)
  return request.param


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_blocks_over_a_cache_equal_the_whole(rows, window, engine):
  """Row b begins b places later; drafts are written and overwritten on the way."""
  config, rng = tiny.tiny_config(heads=6), np.random.default_rng(0)
  length = 15
  q, k, v = (
    rng.normal(size=(rows, length, n, config.head_dim)).astype(np.float32) for n in (6, 2, 2)
  )
  cache = cached.empty_caches(config, rows, PLACES, jnp.float32)[0]
  got = np.zeros_like(q)
  # A prompt, a block, the same once more with a junk tail before it, a single token.
  for start, stop, junk in ((0, 7, 0), (7, 11, 4), (7, 14, 0), (14, 15, 0)):
    at = np.array([min(start, max(start - b, 0)) for b in range(rows)])
    index = at[:, None] + np.arange(stop - start)[None, :]
    part = [np.take_along_axis(x, index[:, :, None, None], axis=1) for x in (q, k, v)]
    if junk:
      part = [x + 100 for x in part]
    at = jnp.asarray(at)
    new = cached.following(at, stop - start)
    attend = cached.attend_with(at, *new, engine)(window)
    out, cache = attend(*map(jnp.asarray, part), cache)
    np.put_along_axis(got, index[:, :, None, None], np.asarray(out), axis=1)
  ends = [15 - b for b in range(rows)]
  for b, end in enumerate(ends):
    want = by_numpy(q[b, :end], k[b, :end], v[b, :end], window)
    np.testing.assert_allclose(got[b, :end], want, atol=1e-5)


def test_a_scale_takes_the_place_of_the_usual_one(engine):
  config = tiny.tiny_config()
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
    jax.random.normal(key, (1, 5, n, config.head_dim))
    for key, n in zip(keys, (4, 2, 2), strict=True)
  )
  at = jnp.zeros(1, jnp.int32)
  attend = cached.attend_with(at, *cached.following(at, 5), engine)(None)
  cache = cached.empty_caches(config, 1, PLACES, jnp.float32)[0]
  want, _ = attend(q * (0.3 * config.head_dim**0.5), k, v, cache)
  got, _ = attend(q, k, v, cache, scale=0.3)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_kernel_gives_branches_what_xla_does(rows, window):
  """Caches of one stretch and of many, empty ones among them; more queries than one program's."""
  block, places, heads, kv_heads = 9, 512, 6, 2
  start = jnp.asarray(np.random.default_rng(1).integers(0, 360, rows))
  base = jnp.asarray(np.random.default_rng(2).integers(0, 3, rows))
  positions, reach = cached.following(start, block)
  tokens = Batch(jnp.zeros_like(positions), positions, is_noise=positions < 0)
  ones = jnp.ones(rows, jnp.int32)
  row = drafts.Rows(base, ones, ones * 8, jnp.ones((rows, block - 1)), ones > 1)
  tokens, reach, *_ = drafts.KINDS["branches"].lay_out(tokens, reach, row, block)
  new = tokens.positions, reach
  shapes = [(rows, block * block, n, 16) for n in (heads, kv_heads, kv_heads)]
  shapes += [(rows, kv_heads, places, 16)] * 2
  keys = jax.random.split(jax.random.key(0), 5)
  q, k, v, *cache = (jax.random.normal(key, x) for key, x in zip(keys, shapes, strict=True))
  holed = [x.at[:, :, 448:].set(jnp.nan) for x in cache]  # no turn of the loop comes there
  got, after = cached_triton.attend(q, k, v, holed, start, *new, window, interpret=True)
  want, want_after = cached._attend(q, k, v, cache, start, *new, window)
  np.testing.assert_allclose(got, want, atol=2e-5)
  for x, y in zip(after, want_after, strict=True):
    np.testing.assert_array_equal(x[:, :, :448], y[:, :, :448])


@pytest.mark.parametrize("head_dim, power_of_two", [(16, True), (24, False)])
def test_the_kernel_is_taken_where_it_is_right(monkeypatch, caplog, head_dim, power_of_two):
  config = tiny.tiny_config(head_dim=head_dim)
  # What the kernels are compared with is computed once.
  monkeypatch.setattr(cached, "_probe", functools.cache(cached._probe))

  def choose(dtype, kernel=None):
    cached.choose_engine.cache_clear()
    caplog.clear()
    if kernel:
      monkeypatch.setattr(cached_triton, "attend", kernel)
    return cached.choose_engine(config, dtype)

  right = functools.partial(cached_triton.attend, interpret=True)
  assert choose(jnp.bfloat16) == "xla" and not caplog.records  # a CPU
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert choose(jnp.float32) == "xla" and not caplog.records
  if not power_of_two:
    assert choose(jnp.bfloat16) == "xla" and not caplog.records
    return
  assert choose(jnp.bfloat16) == "xla" and "not used" in caplog.text  # it does not run here
  assert choose(jnp.bfloat16, right) == "kernel"
  wrong = {  # of (q, k, v, cache, start, positions, reach, window)
    "one place late": lambda *a: right(*a[:4], a[4] + 1, *a[5:]),
    "no branches": lambda *a: right(*a[:6], a[6]._replace(last=a[6].last * 0 - 1), a[7]),
    "no window": lambda *a: right(*a[:7], None),
    "no number": lambda *a: jax.tree.map(lambda x: x * jnp.nan, right(*a)),
    "not written": lambda *a: (right(*a)[0], a[3]),
  }
  for name, kernel in wrong.items():
    assert choose(jnp.bfloat16, kernel) == "xla" and "differs" in caplog.text, name
  cached.choose_engine.cache_clear()


@pytest.mark.parametrize("rows", [1, 4])
def test_a_pass_copies_no_cache(rows):
  """In the compiled loop of passes: nothing of a cache's size is transposed or copied."""
  config = tiny.tiny_config()
  params = layout.join_projections(layout.unstack_layers(tiny.tiny_params(config)))
  settings, size = sampler_settings.Settings(block=4), 512
  state = state_lib.empty(config, settings, rows, size, jnp.float32)
  decode = programs.jitted(sampler.decode, config, settings, None)
  one = np.int32(1)
  text = decode.lower(params, state, np.zeros(rows, bool), one, one).compile().as_text()
  cache_size = rows * size * config.kv_heads * config.head_dim
  moved = []
  for line in text.splitlines():
    before, _, rest = line.partition(" = ")
    dims = rest[rest.find("[") + 1 : rest.find("]")]
    moves = any(f" {name}(" in rest for name in ("copy", "transpose"))
    if moves and dims and np.prod([int(x) for x in dims.split(",")]) >= cache_size:
      moved.append(line.strip())
  assert not moved, "\n".join(moved)
