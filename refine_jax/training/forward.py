"""How a model is computed in a run: precision, kernels, what is kept for the backward pass."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from refine_jax import target
from refine_jax.attention import packed, ranged
from refine_jax.batch import Batch
from refine_jax.model import adapters, draft_head, head, layout, transformer, two_streams
from refine_jax.model.transformer import ModelConfig
from refine_jax.objective.draft_blocks import DraftBlocks
from refine_jax.sharding import pinned


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardConfig:
  """Binds model, attention and head into the one function that the objective needs.

  Static choices, hashable; see configs/base.py for what each means.

  Attributes:
    attention, remat, head_gradient: resolved, never "auto".
    max_segments: most examples in a packed row.
    unroll: layers in one iteration of the scan; all of them: no scan, and a working copy with
      unstacked layers.
    join: the modules whose projections are joined in the working copy (layout.MODULES).
    mesh: None on one device.
    adapter: what is trained instead of all weights; then parameters are its factors, and the
      base's are `frozen`.
    draft_attention: for a gated adapter's draft blocks, and for those of noise.anchors
      (attention.ranged).
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
  adapter: adapters.Adapter | None = None
  draft_attention: str = "xla"

  def cast(self, params: dict) -> dict:
    """The working copy of float32 parameters; made once a step, outside the loops."""
    params = transformer.cast_for_compute(params, jnp.dtype(self.dtype))
    if self.unroll >= self.model.layers:
      params = layout.unstack_layers(params)
    return layout.join_projections(params, self.join)

  def freeze(self, params: dict) -> dict:
    """The working copy of a base that gets no gradient, its embedding and head included."""
    params = {name: x if name == "layers" else self._in_dtype(x) for name, x in params.items()}
    return self.cast(params)

  def _in_dtype(self, tree):
    return jax.tree.map(lambda x: x.astype(self.dtype), tree)

  def working(self, params: dict, frozen: dict | None) -> dict:
    """What the model computes with: a working copy, or the frozen base with the adapter in it."""
    if self.adapter is None:
      return self.cast(params)
    assert frozen is not None
    return adapters.attach(frozen, self._factors(params), self.model)

  def _factors(self, params: dict) -> dict:
    assert self.adapter is not None
    factors = adapters.working_copy(params, self.adapter, jnp.dtype(self.dtype))
    return layout.unstack_layers(factors) if self.unroll >= self.model.layers else factors

  def canonical(self, gradients: dict) -> dict:
    """Gradients of the working copy in the form of the parameters that it was made of."""
    return layout.canonical(gradients, self.model)

  def _attend_with(self, batch: Batch):
    options = {"max_segments": self.max_segments, "mesh": self.mesh, "backend": self.attention}
    if batch.block_columns is not None:
      return ranged.beside(batch, draft_attention=self.draft_attention, **options)
    return packed.for_batch(batch, **options)

  def hidden_states(self, params: dict, batch: Batch) -> jax.Array:
    """The model's last hidden states of a batch: [B, S, D] in `dtype`."""
    return transformer.hidden_states(
      params,
      self.model,
      batch,
      self._attend_with(batch),
      dtype=jnp.dtype(self.dtype),
      remat=self.remat,
      unroll=self.unroll,
      # Several devices sum a layer's gradients while the next layer's backward pass runs.
      backward_slack=0 if self.mesh is None or self.mesh.size == 1 else 1,
      constrain=self._placed,
      adapt_all=self.adapter is not None and self.adapter.kind == "lora",
    )

  def loss(
    self,
    params: dict,
    batch: Batch,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    scored_BS: jax.Array | None = None,
  ) -> tuple[jax.Array, head.HeadOutput]:
    """The sum of weight * cross-entropy, and what the head says: see head.cross_entropy."""
    x_BSD = self.hidden_states(params, batch)
    with jax.named_scope("head"):
      return head.cross_entropy(
        x_BSD,
        transformer.head_matrix(params),
        targets_BS,
        weights_BS,
        scored_BS,
        chunk=self.head_chunk,
        gradient=self.head_gradient,
        frozen=self.adapter is not None,
        mesh=self.mesh,
      )

  def draft_loss(
    self,
    params: dict,
    frozen: dict,
    batch: Batch,
    blocks: DraftBlocks,
    weights_BQ: jax.Array,
    *,
    drafts: int,
    target: str,
  ) -> tuple[jax.Array, draft_head.DraftOutput]:
    """The sum of weight * distance of drafts to their targets: see draft_head.draft_loss.

    Args:
      params: the factors of a gated adapter.
      frozen: the base, as `freeze` makes it.
      drafts: tokens of a block.
    """
    clean_x, draft_x = two_streams.hidden_states(
      frozen,
      self._factors(params),
      self.model,
      batch,
      blocks.tokens,
      self._attend_with(batch),
      ranged.attend_with(
        blocks.first,
        blocks.end,
        blocks.columns,
        block=drafts,
        implementation=self.draft_attention,
        mesh=self.mesh,
      ),
      dtype=jnp.dtype(self.dtype),
      remat=self.remat,
      unroll=self.unroll,
      constrain=self._placed,
    )
    same_place = jnp.take_along_axis(clean_x, blocks.columns[..., None], axis=1)
    with jax.named_scope("head"):
      return draft_head.draft_loss(
        draft_x,
        same_place,
        transformer.head_matrix(frozen),
        blocks.targets,
        weights_BQ,
        target=target,
        chunk=self.head_chunk,
        mesh=self.mesh,
      )

  @property
  def splits_rows(self) -> bool:
    """Whether rows are split over devices that hold the same parameters."""
    return self.mesh is not None and self.mesh.shape["data"] > 1

  @property
  def _rows_alone(self) -> bool:
    return self.mesh is not None and self.mesh.size == self.mesh.shape["data"]

  def inside(self) -> "ForwardConfig":
    """How devices compute what they have of the rows, inside of `summed_once`."""
    return dataclasses.replace(self, mesh=None) if self._rows_alone else self

  def summed_once(self, turns: Callable) -> Callable:
    """Runs a loop over each part of the rows, and sums over "data" once, at its end.

    Without it the compiler sums the gradients of the layers over "data" in every turn.

    Args:
      turns: of (params, trees of arrays [A, B, ..], a tree of others), computed as `inside` has it;
        gives (gradients like params, sums), each a sum over rows.

    Returns:
      the same function of whole arrays. Gradients are summed in the dtype of the parameter, as a
      turn gives them.
    """
    mesh = self.mesh
    assert mesh is not None
    # XLA promotes bfloat16 sums on a CPU, and fails at it where other axes are not split by hand.
    whole = mesh.devices.flat[0].platform == "cpu"

    def local(params, rows, others):
      gradients, sums = turns(params, rows, others)
      rounded = jax.tree.map(lambda g, p: g if whole else g.astype(p.dtype), gradients, params)
      total, sums = jax.lax.psum((rounded, sums), "data")
      return jax.tree.map(lambda t, g: t.astype(g.dtype), total, gradients), sums

    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec()),
      out_specs=PartitionSpec(),
      # Of kernels some want every axis split by hand; beside other axes attention does that.
      axis_names=set(mesh.axis_names) if self._rows_alone else {"data"},
      check_vma=False,
    )

  def _placed(self, x, kind):
    return pinned(x, kind, self.mesh)


def choose_join(mesh: Mesh) -> tuple[str, ...]:
  """Chooses ForwardConfig.join for training: attention, which pays; gate and up do not.

  See docs/performance.md. None where matrices are split, for a join would mix up what devices hold.
  """
  return ("attention",) if mesh.size == mesh.shape["data"] else ()


def choose_unroll(wanted: int, remat: str, layers: int) -> int:
  """Chooses ForwardConfig.unroll: what was asked for, or, for 0, what is fastest here.

  Unstacked layers, without a scan, save copies on a GPU; for a TPU they take minutes to compile.
  But a compiler may recompute early, and then keeps what it was to recompute: where memory is so
  short that it takes "full", a scan holds it to the order.
  """
  if wanted:
    return wanted
  scans = target.platform() != "gpu" or remat == "full"
  return 1 if scans else layers
