"""Tiny models and batches for the tests of the step."""

import dataclasses

import jax
import numpy as np

from refine_jax.batch import Batch
from refine_jax.config import NoiseConfig, ObjectiveConfig, OptimConfig
from refine_jax.model import transformer
from refine_jax.model.rope import RopeConfig
from refine_jax.objective import plan as plan_lib
from refine_jax.objective import rounds as objective
from refine_jax.training.forward import ForwardConfig
from refine_jax.training.step_config import StepConfig

NOISE_TOKEN = 1

# Every field that a decoder of Gemma 3's kind sets, for `tiny_config`.
GEMMA3 = {
  "tied_head": True,
  "qkv_bias": False,
  "qk_norm": True,
  "windows": (3, None),
  "rope": RopeConfig(kind="linear", theta=1e5, factor=4.0),
  "sliding_rope": RopeConfig(theta=1e3),
  "attention_scale": 0.2,
  "embedding_scale": 32**0.5,
  "norm_offset": True,
  "post_norms": True,
  "activation": "gelu_tanh",
}


def tiny_config(**changes) -> transformer.ModelConfig:
  config = transformer.ModelConfig(
    vocab_size=37,
    width=32,
    feed_forward=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope=RopeConfig(),
    tied_head=False,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None, None),
    max_length=128,
    initializer_range=0.3,
  )
  return dataclasses.replace(config, **changes)


def tiny_params(config=None, seed=0):
  return transformer.init_params(config or tiny_config(), jax.random.key(seed))


def params_with_biases(config, seed=0):
  """Biases start at zero, where a wrong one would not show."""
  params = tiny_params(config, seed)
  params["layers"] = jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.1 if path[-1].key == "bias" else x, params["layers"]
  )
  return params


def step_config(
  num_iterations=2,
  loss_weights=None,
  noise=(0.2, 0.8),
  kind="uniform",
  clean_weight=0.0,
  **optim_changes,
) -> StepConfig:
  optim = OptimConfig(
    batch_size=8,
    accumulation=1,
    total_epochs=1,
    total_steps=10,
    lr=1e-3,
    warmup_ratio=0.2,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.01,
    clip_grad=1.0,
    moment_dtype="float32",
    max_nonfinite=3,
  )
  return StepConfig(
    objective=ObjectiveConfig(
      num_iterations=num_iterations,
      loss_weights=tuple(loss_weights or [1.0, 0.7, 0.4, 0.2][:num_iterations]),
      clean_weight=clean_weight,
    ),
    noise=NoiseConfig(
      kind=kind,
      block_size=4,
      offset_decay=1.0,
      noise_min=noise[0],
      noise_max=noise[1],
      token=NOISE_TOKEN,
    ),
    optim=dataclasses.replace(optim, **optim_changes),
    noise_token=NOISE_TOKEN,
    eos_token=1,
    total_steps=10,
    seed=3,
  )


def forward(config=None, **changes) -> ForwardConfig:
  changes = {"max_segments": 3, "head_chunk": 16} | changes
  return ForwardConfig(model=config or tiny_config(), **changes)


def gradients_of_rounds(forward, params, batch, noised, loss_weights, clean_weight=0.0):
  """objective.refinement_gradients of one batch [B, S]."""
  one = jax.tree.map(lambda x: x[None], (batch, noised))
  plan = plan_lib.of_weights(
    loss_weights,
    clean_weight,
    clean_text_inside=batch.block_starts is not None or batch.block_columns is not None,
  )
  return jax.jit(lambda params: objective.refinement_gradients(forward.loss, params, *one, plan))(
    params
  )


def examples(count: int, seed=0, max_prompt=6, max_response=9) -> list:
  """(prompt ids, response ids) with a response that ends in token 1, the EOS of these tests."""
  rng = np.random.default_rng(seed)
  result = []
  for _ in range(count):
    prompt = rng.integers(2, 37, rng.integers(1, max_prompt + 1))
    response = np.append(rng.integers(2, 37, rng.integers(1, max_response + 1)), 1)
    result.append((prompt, response))
  return result


def make_batch(rows: list, length: int) -> Batch:
  """Rows of lists of (example id, prompt, response) -> arrays [B, T]."""
  shape = (len(rows), length)
  batch = Batch(
    ids=np.zeros(shape, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    response_mask=np.zeros(shape, bool),
    example_ids=np.full(shape, -1, np.int32),
  )
  for b, row in enumerate(rows):
    start = 0
    for s, (example, prompt, response) in enumerate(row):
      tokens = np.concatenate([prompt, response])
      span = (b, slice(start, start + len(tokens)))
      batch.ids[span] = tokens
      batch.segment_ids[span] = s + 1
      batch.positions[span] = np.arange(len(tokens))
      batch.response_mask[span] = np.arange(len(tokens)) >= len(prompt)
      batch.example_ids[span] = example
      start += len(tokens)
  return batch


def packed_batch(count=12, per_row=3, length=48, seed=0) -> Batch:
  data = [(i, *e) for i, e in enumerate(examples(count, seed))]
  return make_batch([data[i : i + per_row] for i in range(0, count, per_row)], length)


def unpacked_batch(count=12, length=16, seed=0) -> Batch:
  return make_batch([[(i, *e)] for i, e in enumerate(examples(count, seed))], length)


def split(batch: Batch, parts: int) -> Batch:
  """[B, T] -> [A, B / A, T]."""
  return batch.map(lambda x: x.reshape(parts, -1, x.shape[-1]))
