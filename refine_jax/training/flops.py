"""Model FLOPs of a step, and what devices can do at most."""

from typing import NamedTuple

from refine_jax import target
from refine_jax.model.transformer import ModelConfig


def matmul_flops_per_token(config: ModelConfig) -> int:
  """Multiply-adds, counted as two, of one token's forward pass through all matrices."""
  query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
  layer = config.width * (2 * query + 2 * key) + 3 * config.width * config.feed_forward
  return 2 * (config.layers * layer + config.width * config.vocab_size)


def attention_flops(config: ModelConfig, length: float) -> float:
  """FLOPs of one token's scores and values in a causal sequence of `length`: mean, all layers."""
  spans = [min(length, w or length) for w in config.windows]
  return sum(2 * 2 * config.heads * config.head_dim * span / 2 for span in spans)


def train_flops_per_token(config: ModelConfig, length: float, rounds: float) -> float:
  """Model FLOPs of training on one clean token: forward and backward of every round.

  Recomputation is not counted, attention's causal half is: the convention of the MFU here.
  """
  return rounds * 3 * (matmul_flops_per_token(config) + attention_flops(config, length))


def gated_flops_per_token(config: ModelConfig, length: float, drafts: float) -> float:
  """Model FLOPs of training a gated adapter, for one clean token.

  A forward pass of the token, and for each draft token a forward pass and one backward pass, for
  activations alone; the adapter's own products are not counted.

  Args:
    drafts: draft tokens for each clean one.
  """
  forward = matmul_flops_per_token(config) + attention_flops(config, length)
  return forward * (1 + 2 * drafts)


class Device(NamedTuple):
  """What the maker of a device states.

  Attributes:
    kind: a part of jax's device_kind; the first entry that matches holds.
    flops: dense bfloat16 peak, FLOP/s.
    bandwidth: of the memory, bytes/s; None where devices of this kind differ.
  """

  kind: str
  flops: float
  bandwidth: float | None


DEVICES = (
  Device("H100 PCIe", 756e12, 2.0e12),
  Device("H100", 989e12, 3.35e12),
  Device("GH200", 989e12, None),
  Device("H200", 989e12, 4.8e12),
  Device("B200", 2250e12, 8.0e12),
  Device("A100", 312e12, None),
  Device("L40S", 362e12, 0.864e12),
  Device("L4", 121e12, 0.3e12),
  Device("T4", 65e12, 0.32e12),
  Device("v6 lite", 918e12, 1.64e12),
  Device("v6e", 918e12, 1.64e12),
  Device("v5 lite", 197e12, 0.819e12),
  Device("v5e", 197e12, 0.819e12),
  Device("v5p", 459e12, 2.765e12),
  Device("v5", 459e12, 2.765e12),
  Device("v4", 275e12, 1.228e12),
)


def device() -> Device | None:
  """Returns the entry of what programs are made for (target.py); None where it is not known."""
  kind = target.kind()
  return next((entry for entry in DEVICES if entry.kind in kind), None)


def peak_flops() -> float | None:
  """FLOP/s in bfloat16 of one of this process's devices; None where it is not known."""
  known = device()
  return known.flops if known else None


def peak_bandwidth() -> float | None:
  """Bytes/s of the memory of one of this process's devices; None where it is not known."""
  known = device()
  return known.bandwidth if known else None
