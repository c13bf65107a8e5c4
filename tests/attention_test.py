"""Engines against a loop over segments, forward and backward; the choice between engines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refine_jax import sharding
from refine_jax.attention import choose, packed
from refine_jax.batch import Batch
from refine_jax.config import MeshConfig
from refine_jax.errors import UserError

B, T, H, K, D = 2, 40, 6, 2, 8
LENGTHS = ((17, 1, 12), (25, 9))  # unequal, and a padded tail


def segment_ids(lengths=LENGTHS, length=T):
  ids = np.zeros((len(lengths), length), np.int32)
  for row, sizes in zip(ids, lengths, strict=True):
    row[: sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
  return jnp.asarray(ids)


def tensors(length=T, head_dim=D):
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (H, K, K, H)
  return [
    jax.random.normal(key, (B, length, n, head_dim)) for key, n in zip(keys, heads, strict=True)
  ]


def loop_over_segments(q, k, v, ids, window):
  """Softmax of each query over the keys of its own segment, one by one, in torch."""
  rows = []
  for b in range(B):
    out = []
    for t in range(q.shape[1]):
      seen = [
        s for s in range(t + 1) if ids[b, s] == ids[b, t] and (window is None or t - s < window)
      ]
      keys, values = (x[b, seen].repeat_interleave(H // K, dim=1) for x in (k, v))
      scores = torch.einsum("hd,shd->hs", q[b, t], keys) / q.shape[-1] ** 0.5
      out.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values))
    rows.append(torch.stack(out))
  return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_engines_equal_a_loop_over_segments(backend, window):
  segments = segment_ids()
  q, k, v, weight = tensors()
  weight = weight * (segments > 0)[..., None, None]  # of real tokens alone

  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def engine(q, k, v):
    attend = packed.attend_with(segments, backend=backend, max_segments=3, interpret=True)
    out = attend(window)(q, k, v, None)[0] * (segments > 0)[..., None, None]
    return jnp.sum(out * weight), out

  (_, out), gradients = engine(q, k, v)
  leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (q, k, v)]
  want = loop_over_segments(*leaves, np.asarray(segments), window)
  want = want * torch.tensor(np.asarray(segments) > 0)[..., None, None]
  (want * torch.tensor(np.asarray(weight))).sum().backward()
  np.testing.assert_allclose(out, want.detach().numpy(), atol=1e-5)
  for got, leaf in zip(gradients, leaves, strict=True):
    np.testing.assert_allclose(got, leaf.grad.numpy(), atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_scale_takes_the_place_of_the_usual_one(backend):
  q, k, v, _ = tensors()
  attend = packed.attend_with(segment_ids(), backend=backend, max_segments=3, interpret=True)(5)
  usual = q.shape[-1] ** -0.5
  np.testing.assert_array_equal(attend(q, k, v, None, usual)[0], attend(q, k, v, None)[0])
  want = attend(q * (0.3 / usual), k, v, None)[0]
  np.testing.assert_allclose(attend(q, k, v, None, 0.3)[0], want, atol=1e-5)


def test_a_scale_holds_for_blocks_beside_their_text_too():
  q, k, v, _ = (jnp.concatenate([x, x[:, ::-1]], axis=1) for x in tensors())
  segments = segment_ids()
  positions = packed.segment_positions(segments)
  doubled = Batch(jnp.zeros_like(segments), positions, segments).map(lambda x: jnp.tile(x, 2))
  attend = packed.for_batch(doubled._replace(block_starts=positions // 7 * 7))(5)
  want = attend(q * (0.3 * q.shape[-1] ** 0.5), k, v, None)[0]
  np.testing.assert_allclose(attend(q, k, v, None, 0.3)[0], want, atol=1e-5)


def test_padding_gives_finite_values():
  q, k, v, _ = tensors()
  out, _ = packed.attend_with(segment_ids(((3,), ())), backend="xla")(None)(q, k, v, None)
  assert np.isfinite(out).all()


def test_a_mesh_does_not_change_the_answer():
  q, k, v, _ = tensors()
  ids = segment_ids()
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
  one = packed.attend_with(ids, backend="xla")(7)(q, k, v, None)[0]
  split = jax.jit(
    lambda q, k, v: packed.attend_with(ids, backend="xla", mesh=mesh)(7)(q, k, v, None)[0]
  )
  np.testing.assert_allclose(split(q, k, v), one, atol=1e-6)


def test_segment_layout_lists_lengths_and_starts_with_the_padding_as_one_more():
  lengths, starts = packed.segment_layout(segment_ids(), max_segments=3)
  np.testing.assert_array_equal(lengths, [[17, 1, 12, 10], [25, 9, 6, -1]])
  np.testing.assert_array_equal(starts, [[0, 17, 18, 30, -1], [0, 25, 34, -1, -1]])


def test_segment_layout_of_rows_that_are_full_or_empty():
  lengths, starts = packed.segment_layout(segment_ids(((20, 20), ())), max_segments=2)
  np.testing.assert_array_equal(lengths, [[20, 20, -1], [40, -1, -1]])
  np.testing.assert_array_equal(starts, [[0, 20, -1, -1], [0, -1, -1, -1]])


CHOICE = dict(heads=4, kv_heads=2, head_dim=8, dtype="bfloat16", max_segments=3)


def test_auto_is_the_reference_on_a_cpu():
  assert choose.choose_backend("auto", packed=True, **CHOICE) == "xla"


def test_an_engine_by_name_that_cannot_run_here_says_so():
  with pytest.raises(UserError, match="needs a gpu"):
    choose.choose_backend("cudnn_packed", packed=True, **CHOICE)
  with pytest.raises(UserError, match="across the examples"):
    choose.choose_backend("cudnn", packed=True, **CHOICE)


def test_the_probe_catches_an_engine_that_ignores_segments(monkeypatch):
  def blind(q, k, v, ids, *, window, scale, interpret):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)

  monkeypatch.setattr(packed, "_splash", blind)
  assert "differs from the reference" in choose._probe("splash", 4, 2, 8, 3, False)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_probe_accepts_the_reference(blocks):
  assert choose._probe("xla", 4, 2, 8, 3, blocks) is None


def test_auto_falls_back_with_a_warning(monkeypatch, caplog):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(choose, "_PACKED_SINCE", (0, 0, 1))
  monkeypatch.setattr(choose, "_probe", lambda *a: "a reason")
  assert choose.choose_backend("auto", packed=True, **CHOICE) == "xla"
  assert "a reason" in caplog.text
