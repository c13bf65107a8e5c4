"""How a model is computed in a run: precision, kernels, what is kept for the backward pass.

`Compute` binds the model, the attention engine and the head into the one function that the
objective needs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refine_jax.attention import packed
from refine_jax.model import head, layout, transformer
from refine_jax.model import remat as remat_lib
from refine_jax.model.transformer import ModelConfig
from refine_jax.sharding import BATCH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """Static choices, hashable; see configs/base.py for what each means.

  Attributes:
    attention, remat, head_gradient: resolved, never "auto".
    max_segments: most examples in a packed row.
    unroll: layers in a turn of the scan; all of them: no scan, and a working copy with layers
      apart.
    join: the modules whose projections are joined in the working copy (layout.MODULES).
    mesh: None on one device.
  """

  model: ModelConfig
  dtype: str = "float32"
  attention: str = "xla"
  max_segments: int = 1
  remat: str = "none"
  unroll: int = 1
  join: tuple[str, ...] = ()
  head_chunk: int = 2048
  head_gradient: str = "forward"
  mesh: Mesh | None = None

  def cast(self, params: dict) -> dict:
    """The working copy of float32 parameters; made once a step, outside the loops."""
    params = transformer.cast_for_compute(params, jnp.dtype(self.dtype))
    if self.unroll >= self.model.layers:
      params = layout.unstack_layers(params)
    return layout.join_projections(params, self.join)

  def canonical(self, gradients: dict) -> dict:
    """Gradients of the working copy in the form of the parameters that it was made of."""
    return layout.canonical(gradients, self.model)

  def hidden_states(self, params: dict, ids_BT, batch: dict):
    """[B, T, D] in `dtype`, of these ids in the rows of `batch`."""
    return transformer.hidden_states(
      params,
      self.model,
      ids_BT,
      batch["positions"],
      self._attend_with(batch),
      dtype=jnp.dtype(self.dtype),
      remat=self.remat,
      unroll=self.unroll,
      # Over several devices, the sum of a layer's gradients has the time of the next one's pass.
      backward_slack=0 if self.mesh is None or self.mesh.size == 1 else 1,
      constrain=self._rows_stay_split,
    )

  def _attend_with(self, batch: dict):
    options = {"backend": self.attention, "max_segments": self.max_segments, "mesh": self.mesh}
    if "block_starts" in batch:
      return packed.beside(batch, **options)
    return packed.attend_with(batch["segment_ids"], **options)

  def loss(self, params: dict, ids_BT, batch: dict, targets_BT, weights_BT, scored_BT=None):
    """(sum of weight * cross-entropy, head.HeadOutput): see head.cross_entropy."""
    x_BTD = self.hidden_states(params, ids_BT, batch)
    with jax.named_scope("head"):
      return head.cross_entropy(
        x_BTD,
        transformer.head_matrix(params),
        targets_BT,
        weights_BT,
        scored_BT,
        chunk=self.head_chunk,
        gradient=self.head_gradient,
        mesh=self.mesh,
      )

  def _rows_stay_split(self, x_BTD):
    if self.mesh is None or self.mesh.size == 1:
      return x_BTD
    sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES, None, None))
    return jax.lax.with_sharding_constraint(x_BTD, sharding)


def choose_join(mesh: Mesh) -> tuple:
  """Of Compute.join, for training: attention, which pays; gate and up do not (docs/performance.md).

  None where matrices are split, for a join would mix up what devices hold.
  """
  return ("attention",) if mesh.size == mesh.shape["data"] else ()


def choose_unroll(wanted: int, remat: str, layers: int) -> int:
  """Of Compute.unroll: what was asked for, or, for 0, what is fastest here.

  Layers apart, without a scan, save copies on an accelerator. But a compiler may recompute early,
  and then keeps what it was to recompute: where memory is so short that it takes "full", a scan
  holds it to the order.
  """
  if wanted:
    return wanted
  scans = jax.default_backend() == "cpu" or remat == "full"
  return 1 if scans else layers


def saved_bytes_per_token(config: ModelConfig, remat: str, itemsize: int) -> int:
  """An estimate of what all layers together keep of a token for the backward pass."""
  query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
  kept = config.width  # the residual stream between layers
  if remat != "full":
    kept += 2 * query + 2 * key
  if remat in ("mlp", "none"):
    kept += 2 * config.feed_forward
  if remat == "none":
    # Norms' inputs in float32, rotations, the gated product: about as much again.
    kept += 6 * config.width + 2 * query + 2 * key + 2 * config.feed_forward
  return kept * itemsize * config.layers


def state_bytes(shapes, moment_itemsize: int = 4) -> int:
  """float32 parameters and Adam's two moments."""
  count = sum(x.size for x in jax.tree.leaves(shapes))
  return count * (4 + 4 + moment_itemsize)


def choose_remat(
  wanted: str,
  config: ModelConfig,
  *,
  dtype: str,
  tokens: int,
  parameters: int,
  head_chunk: int,
  memory: int | None,
  moment_itemsize: int = 4,
) -> str:
  """The policy that recomputes least among those that fit, or `wanted` where it names one.

  Args:
    tokens: in a micro-batch, on one device.
    parameters: on one device.
    memory: bytes of one device; None (a CPU): nothing is recomputed.
  """
  if wanted != "auto":
    return wanted
  if memory is None:
    return "none"
  itemsize = jnp.dtype(dtype).itemsize
  # Masters and moments, the sum of gradients, one round's gradients, the working copy.
  fixed = parameters * (4 + 4 + moment_itemsize + 4 + itemsize + itemsize)
  fixed += head_chunk * config.vocab_size * (4 + itemsize)
  room = 0.9 * memory - fixed
  for policy in remat_lib.POLICIES:
    # One layer's backward pass needs about as much as "none" keeps of it.
    working = tokens * saved_bytes_per_token(config, "none", itemsize) / config.layers
    if tokens * saved_bytes_per_token(config, policy, itemsize) + working <= room:
      return policy
  return "full"


def device_memory() -> int | None:
  """Bytes that this process may use of its first device; None where it is not known (CPU)."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit")


def matmul_flops_per_token(config: ModelConfig) -> int:
  """Multiply-adds, counted as two, of one token's forward pass through all matrices."""
  query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
  layer = config.width * (2 * query + 2 * key) + 3 * config.width * config.feed_forward
  return 2 * (config.layers * layer + config.width * config.vocab_size)


def attention_flops(config: ModelConfig, length: float) -> float:
  """Of one token in a causal sequence of `length`, on average: scores and values, all layers."""
  spans = [min(length, w or length) for w in config.windows]
  return sum(2 * 2 * config.heads * config.head_dim * span / 2 for span in spans)


def train_flops_per_token(config: ModelConfig, length: float, rounds: int) -> float:
  """Model FLOPs of training on one clean token: forward and backward of every round.

  Recomputation is not counted, attention's causal half is: the convention of the MFU here.
  """
  return rounds * 3 * (matmul_flops_per_token(config) + attention_flops(config, length))


# Dense bfloat16 peak of one device, FLOP/s, by a part of its device_kind.
_PEAKS = (
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("H200", 989e12),
  ("GH200", 989e12),
  ("B200", 2250e12),
  ("A100", 312e12),
  ("L40S", 362e12),
  ("L4", 121e12),
  ("T4", 65e12),
  ("v6 lite", 918e12),
  ("v6e", 918e12),
  ("v5 lite", 197e12),
  ("v5e", 197e12),
  ("v5p", 459e12),
  ("v5", 459e12),
  ("v4", 275e12),
)


@functools.cache
def peak_flops() -> float | None:
  """FLOP/s in bfloat16 of one of this process's devices; None where it is not known."""
  kind = jax.local_devices()[0].device_kind
  return next((peak for name, peak in _PEAKS if name in kind), None)
