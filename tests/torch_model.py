"""The decoder once more, in torch float64, written from the papers: an oracle of the tests."""

import jax
import numpy as np
import torch

from refine_jax.model import transformer


def leaves(params):
  """Parameters as float64 tensors that gather gradients."""
  return jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True), params)


def forward(params, config, ids, segment_ids, positions):
  """Dense logits [B, T, V]."""
  head_dim = config.head_dim

  def norm(x, scale):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * scale

  inverse = config.rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
  angles = torch.tensor(positions, dtype=torch.float64)[..., None] * inverse
  cos, sin = torch.cos(angles)[:, :, None], torch.sin(angles)[:, :, None]

  def rotate(x):
    a, b = x[..., : head_dim // 2], x[..., head_dim // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  segments = torch.tensor(segment_ids)
  length = segments.shape[1]
  mask = segments[:, :, None] == segments[:, None, :]
  mask = mask & torch.ones(length, length).tril().bool()
  x = params["embedding"][torch.tensor(np.asarray(ids), dtype=torch.long)]
  for i in range(config.layers):
    p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    a, m = p["attention"], p["mlp"]
    y = norm(x, p["attention_norm"]["scale"])
    split = lambda name, y=y, a=a: (  # noqa: E731
      (y @ a[name]["kernel"] + a[name]["bias"]).unflatten(-1, (-1, head_dim))
    )
    q, k, v = rotate(split("query")), rotate(split("key")), split("value")
    groups = config.heads // config.kv_heads
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / head_dim**0.5
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    out = torch.einsum("bhts,bshd->bthd", torch.softmax(scores, -1), v).flatten(-2)
    x = x + out @ a["output"]["kernel"]
    y = norm(x, p["mlp_norm"]["scale"])
    gated = torch.nn.functional.silu(y @ m["gate"]["kernel"]) * (y @ m["up"]["kernel"])
    x = x + gated @ m["down"]["kernel"]
  x = norm(x, params["final_norm"]["scale"])
  return x @ transformer.head_matrix(params).T


def assert_equal(gradients, sums, want_losses, want):
  """What objective.refinement_gradients gave, and the losses and gradients of an oracle."""
  # Sorted, the clean text's loss comes first, then the rounds.
  losses = [sums[name]["loss"] / sums[name]["count"] for name in sorted(sums)]
  np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-6, rtol=1e-3), gradients, want)
