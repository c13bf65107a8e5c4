"""The shape of a model, as everything that computes with it wants it."""

import dataclasses
import json

from refine_jax.model.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The shape of a model; `hf/config.py` reads it from a Hugging Face config.json.

  A field with a default is one that was added later: a checkpoint that lacks it has the default.

  Attributes:
    rope: rotary embeddings, of all layers or of those that `sliding_rope` leaves.
    windows: for each layer the sliding window (a token sees itself and window - 1 before it),
      or None for all that came before.
    max_length: positions the model is made for.
    sliding_rope: rotary embeddings of the layers that have a window; None: `rope`.
    attention_scale: queries times keys are multiplied by it; None: head_dim ** -0.5.
    embedding_scale: embeddings are multiplied by it, rounded to their dtype; None: they are not.
    norm_offset: norms multiply by 1 + scale, not by scale.
    post_norms: the outputs of attention and MLP are normed too, before they are added.
    activation: of the MLP's gate, a key of ACTIVATIONS.
  """

  vocab_size: int
  width: int
  feed_forward: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  norm_eps: float
  rope: RopeConfig
  tied_head: bool
  qkv_bias: bool
  output_bias: bool
  mlp_bias: bool
  qk_norm: bool
  windows: tuple[int | None, ...]
  max_length: int
  initializer_range: float
  sliding_rope: RopeConfig | None = None
  attention_scale: float | None = None
  embedding_scale: float | None = None
  norm_offset: bool = False
  post_norms: bool = False
  activation: str = "silu"

  def record(self) -> dict:
    """The JSON that a checkpoint keeps of it: the fields that are not at their default."""
    values = dataclasses.asdict(self)
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    return json.loads(json.dumps({k: v for k, v in values.items() if v != defaults[k]}))
