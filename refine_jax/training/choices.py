"""Every choice of how a run computes: what is trained, by which implementations, in what memory."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from refine_jax import sharding, target
from refine_jax.attention import ranged
from refine_jax.attention.choose import choose_backend
from refine_jax.config import Config
from refine_jax.errors import UserError
from refine_jax.model import adapters, transformer
from refine_jax.model.transformer import ModelConfig
from refine_jax.objective import draft_blocks, noise
from refine_jax.objective import plan as plan_lib
from refine_jax.training import forward as forward_lib
from refine_jax.training import memory
from refine_jax.training.data_plan import RowLimits
from refine_jax.training.flops import gated_flops_per_token, train_flops_per_token
from refine_jax.training.step_config import StepConfig


def choose_forward(
  config: Config, shape: ModelConfig, mesh: Mesh, plan: RowLimits
) -> forward_lib.ForwardConfig:
  """Resolves every "auto"."""
  source = config.model
  dtype = source.compute_dtype
  tensor = mesh.shape["tensor"]
  if config.data.max_length > shape.max_length:
    raise UserError(
      f"config.data.max_length={config.data.max_length} is beyond the model's"
      f" {shape.max_length} positions; lower it."
    )
  engine = choose_backend(
    source.attention,
    heads=shape.heads // tensor,
    kv_heads=shape.kv_heads // tensor,
    head_dim=shape.head_dim,
    dtype=dtype,
    max_segments=plan.max_segments,
    packed=config.data.pack,
    blocks=noise.from_config(config.noise).clean_text_inside and not config.noise.anchors,
    scale=shape.attention_scale,
  )
  adapter = make_adapter(config)
  base, trained = (param_shapes(shape, x) for x in (None, adapter))
  on_device, base_on_device = (
    bytes_per_device(x, sharding.shardings(x, mesh)) // 4 for x in (trained, base)
  )
  rows_on_device = config.optim.micro_batch // sharding.batch_shards(mesh)
  room = target.memory()
  if adapter and room:  # the frozen base is held once, in the computing dtype
    itemsize = jnp.dtype(dtype).itemsize
    room -= base_on_device * itemsize
    if adapter.kind == "gated":
      room -= memory.kept_keys_values(shape, rows_on_device * config.data.max_length, itemsize)
  remat = memory.choose_remat(
    source.remat,
    shape,
    dtype=dtype,
    tokens=rows_on_device * trained_columns(config, plan),
    parameters=on_device,
    head_chunk=source.head_chunk,
    memory=room,
    moment_itemsize=jnp.dtype(config.optim.moment_dtype).itemsize,
    adapted=adapter is not None,
  )
  gradient = source.head_gradient
  if gradient == "auto":
    # A frozen head has no gradient [V, D] that recomputing would save.
    cheap = adapter is not None or mesh.size == mesh.shape["data"]
    gradient = "forward" if cheap else "recompute"
  # Two streams unstacked are so many kernels that compiling takes minutes.
  wanted = source.scan_unroll or int(config.adapter.kind == "gated")
  unroll = forward_lib.choose_unroll(wanted, remat, shape.layers)
  return forward_lib.ForwardConfig(
    model=shape,
    dtype=dtype,
    attention=engine,
    max_segments=plan.max_segments,
    remat=remat,
    unroll=unroll,
    head_chunk=source.head_chunk,
    head_gradient=gradient,
    mesh=mesh,
    join=forward_lib.choose_join(mesh),
    adapter=adapter,
    draft_attention=_draft_attention(config, shape, dtype),
  )


def _draft_attention(config: Config, shape: ModelConfig, dtype: str) -> str:
  """Of blocks of drafts: "xla" where it is asked for or there are none, else the best."""
  blocks = config.adapter.kind == "gated" or (config.noise.kind == "block" and config.noise.anchors)
  if config.model.attention == "xla" or not blocks:
    return "xla"
  return ranged.choose(shape.heads, shape.kv_heads, shape.head_dim, dtype)


def make_adapter(config: Config) -> adapters.Adapter | None:
  """What is trained instead of all weights, or None."""
  values = dataclasses.asdict(config.adapter)
  return None if config.adapter.kind == "none" else adapters.Adapter(**values)


def param_shapes(shape: ModelConfig, adapter: adapters.Adapter | None) -> dict:
  """The shapes of what is trained: of an adapter's factors, or of all weights."""
  return jax.eval_shape(lambda: new_params(shape, adapter, jax.random.key(0)))


def new_params(shape: ModelConfig, adapter: adapters.Adapter | None, key: jax.Array) -> dict:
  """What is trained, before the first step: new factors, or random weights."""
  if adapter is None:
    return transformer.init_params(shape, key)
  return adapters.init_params(shape, adapter, key)


def most_tiles(config: Config, plan: RowLimits) -> int | None:
  """StepConfig.most_tiles: None where blocks do not tile the responses."""
  if config.adapter.kind != "gated" or config.noise.anchors:
    return None
  return plan.most_tiles(config.noise.block_size - 1)


def trained_columns(config: Config, plan: RowLimits) -> int:
  """Tokens for each row that the backward pass goes through."""
  length = config.data.max_length
  if config.adapter.kind == "gated":
    drafts, most = config.noise.block_size - 1, most_tiles(config, plan)
    return draft_blocks.count_blocks(length, config.noise.anchors, drafts, most) * drafts
  return noise.from_config(config.noise).columns(length)


def bytes_per_device(tree: Any, places: Any) -> int:
  """Bytes of a tree of arrays or shapes on each device, placed so."""
  sizes = jax.tree.map(
    lambda x, s: jnp.dtype(x.dtype).itemsize * math.prod(s.shard_shape(x.shape)), tree, places
  )
  return sum(jax.tree.leaves(sizes))


def flops_per_token(
  config: Config, model: ModelConfig, rows: RowLimits, length: float, step_config: StepConfig
) -> float:
  """Model FLOPs of a step for each token of the rows.

  Args:
    length: mean over tokens of the length of the token's example.
  """
  columns = trained_columns(config, rows) / config.data.max_length
  if step_config.gated:
    return gated_flops_per_token(model, length, columns)
  return train_flops_per_token(model, length, plan_lib.passes(step_config.plan) * columns)
