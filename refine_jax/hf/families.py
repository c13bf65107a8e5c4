"""Families of models as records: all that differs between them in config.json and in tensor names.

To add one, add a record here (docs/extending.md). Nothing else asks which family a model is of.
Sources: the families' configuration and modeling files in transformers 5.
"""

import dataclasses
from collections.abc import Callable, Mapping

from refine_jax.errors import UserError
from refine_jax.quoting import shown

# Ours (under "layers/", where the leading axis is the layer) -> theirs (under model.layers.N.).
# Matrices are transposed: theirs are [outputs, inputs].
_LAYER_NAMES = {
  "attention_norm/scale": "input_layernorm.weight",
  "mlp_norm/scale": "post_attention_layernorm.weight",
  "attention/query_norm/scale": "self_attn.q_norm.weight",
  "attention/key_norm/scale": "self_attn.k_norm.weight",
} | {
  f"{ours}/{kind}": f"{theirs}.{'weight' if kind == 'kernel' else 'bias'}"
  for kind in ("kernel", "bias")
  for ours, theirs in {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
  }.items()
}
_TOP_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "head": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What a family has of its own.

  Attributes:
    model_type, architecture: the names in config.json.
    defaults: what transformers assumes where a key is absent. Its keys are read.
    only: keys that would change the computation -> the values that do not; null is always one.
    harmless: keys that change nothing, besides those of all families.
    sliding: (config.json's keys, layer) -> whether the layer slides, where there is a window.
    layer_types_decide: layer_types, where given, say which layers slide; else they have to repeat
      what `sliding` says.
    rope_theta: the base of the rotary embeddings where config.json has none.
    sliding_rope_theta: the same for sliding layers, where these have rotary embeddings of their
      own: `rope_local_base_freq`, or `rope_parameters` by layer type.
    qkv_bias, output_bias: always, never, or (None) as attention_bias says.
    qk_norm, norm_offset, post_norms, activation: as in ModelConfig.
    embedding_scaled: embeddings are multiplied by the root of the width.
    layer_names, top_names: ours -> theirs, of the tensors.
  """

  model_type: str
  architecture: str
  defaults: dict[str, object]
  only: Mapping[str, tuple]
  harmless: frozenset[str] = frozenset()
  sliding: Callable[[Mapping, int], bool]
  layer_types_decide: bool = False
  rope_theta: float = 10000.0
  sliding_rope_theta: float | None = None
  qkv_bias: bool | None = None
  output_bias: bool | None = None
  qk_norm: bool = False
  norm_offset: bool = False
  post_norms: bool = False
  activation: str = "silu"
  embedding_scaled: bool = False
  layer_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LAYER_NAMES)
  top_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _TOP_NAMES)


_SILU = {"hidden_act": ("silu", "swish")}

_LLAMA = Family(
  model_type="llama",
  architecture="LlamaForCausalLM",
  defaults={"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
  only=_SILU | {"sliding_window": (), "use_sliding_window": (False,)},
  sliding=lambda c, layer: False,
)
_MISTRAL = Family(
  model_type="mistral",
  architecture="MistralForCausalLM",
  defaults={
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
  },
  only=_SILU | {"attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (True,)},
  sliding=lambda c, layer: True,
)
_QWEN2 = Family(
  model_type="qwen2",
  architecture="Qwen2ForCausalLM",
  defaults={
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
  },
  only=_SILU | {"attention_bias": (True,), "mlp_bias": (False,)},
  sliding=lambda c, layer: layer >= c["max_window_layers"],
  layer_types_decide=True,
  qkv_bias=True,
  output_bias=False,
)
_QWEN3 = dataclasses.replace(
  _QWEN2,
  model_type="qwen3",
  architecture="Qwen3ForCausalLM",
  defaults=_QWEN2.defaults | {"head_dim": 128, "attention_bias": False},
  only=_SILU | {"mlp_bias": (False,)},
  qkv_bias=None,
  output_bias=None,
  qk_norm=True,
)
_GEMMA3 = Family(
  model_type="gemma3_text",
  architecture="Gemma3ForCausalLM",
  defaults={
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "attention_bias": False,
    "tie_word_embeddings": True,
  },
  only={
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_act": ("gelu_pytorch_tanh",),
    "mlp_bias": (False,),
    "use_sliding_window": (True,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_bidirectional_attention": (False,),
  },
  # The pattern under its private name goes with layer_types, which decide.
  harmless=frozenset({"cache_implementation", "_sliding_window_pattern"}),
  sliding=lambda c, layer: (layer + 1) % c["sliding_window_pattern"] != 0,
  layer_types_decide=True,
  rope_theta=1000000.0,
  sliding_rope_theta=10000.0,
  qk_norm=True,
  norm_offset=True,
  post_norms=True,
  activation="gelu_tanh",
  embedding_scaled=True,
  layer_names=_LAYER_NAMES
  | {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
  },
)

FAMILIES = {f.model_type: f for f in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA3)}


def family_of(values: dict, where: str = "config.json") -> Family:
  """The record of a config.json's family; `where` names it in messages.

  Raises:
    UserError: model_type or architectures names something else.
  """
  name = values.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise UserError(
      f"{where}: model_type={shown(name)} is not supported; supported are {', '.join(FAMILIES)}."
    )
  family = FAMILIES[name]
  architectures = values.get("architectures")
  architectures = [] if architectures is None else architectures
  known = isinstance(architectures, list) and all(
    isinstance(a, str) and a.lower() == family.architecture.lower() for a in architectures
  )
  if not known:
    raise UserError(
      f"{where}: architectures={shown(architectures)} is not supported for {name};"
      f" [{family.architecture!r}] is."
    )
  return family
