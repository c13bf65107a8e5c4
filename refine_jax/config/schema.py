"""Every key of a run: its type, default, meaning and bounds; the last sections are in schema_run.

Flags, checks, configs/base.py, --help and docs/config.md are made from these declarations. Rules
between keys are in checks.py.
"""

import dataclasses

from refine_jax.config.key import MOST_ROWS, MOST_TOKENS, key
from refine_jax.config.schema_run import CheckpointConfig, EvalConfig, LogConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Files, columns, and how examples become rows."""

  train_files: str = key(
    "",
    "A prompt and a response per row, as Parquet or JSON lines (.jsonl, .ndjson, .json): a path, a"
    " glob, or several, comma-separated. A row that is null, empty, of another type, or refused by"
    " the chat template or the tokenizer is dropped, counted by reason, and the first few are"
    " named; more than nine of ten such rows stop the run before its first step.",
  )
  val_files: str = key("", "The same for validation; empty: none.")
  prompt_key: str = key(
    "prompt", "The prompt's column: a string or a list of chat messages {role, content}."
  )
  response_key: str = key(
    "target",
    "The response's column, of the same kinds. Tool calls and reasoning in it are trained on as the"
    " chat template writes them; a template that does not write them drops the row.",
  )
  max_length: int = key(
    2048, "Tokens per row: prompt, response and EOS together.", least=2, most=MOST_TOKENS
  )
  truncation: str = key(
    "right",
    "What a longer example does: stop the run, lose its first tokens, or lose its last.",
    choices=("error", "left", "right"),
  )
  pack: bool = key(
    True, "Fill each row with several examples (attention never crosses); False: one per row."
  )
  max_segments: int = key(
    64, "Examples per row at most; a kernel's metadata grows with it.", least=1, most=2**16
  )
  chat_template: str = key(
    "", "A Jinja chat template for tokenizers without one; empty: stop if there is none."
  )
  cache_dir: str = key(
    "", "Where tokenised data is kept; empty: ~/.cache/refine_jax. REFINE_JAX_CACHE overrides it."
  )
  prefetch: int = key(4, "Batches made ready ahead of the step.", least=1, most=1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
  """Where the model comes from and how it is computed."""

  pretrained: str = key(
    "", "A Hugging Face directory or hub name with weights to start from; empty: from scratch."
  )
  config: str = key("", "From scratch: a directory with config.json; weights there are not read.")
  tokenizer: str = key(
    "", "A directory or hub name; empty: the same as model.pretrained, or model.config."
  )
  trust_remote_code: bool = key(
    False, "Let transformers run Python code that comes with a hub tokenizer."
  )
  compute_dtype: str = key(
    "bfloat16",
    "Of matrix products and activations; master weights stay in float32.",
    choices=("float32", "bfloat16"),
  )
  attention: str = key(
    "auto",
    "The implementation of attention (refine_jax/attention/choose.py).",
    choices=("auto", "xla", "cudnn", "cudnn_packed", "splash"),
  )
  remat: str = key(
    "auto",
    "What a layer recomputes in its backward pass: none: nothing; save_attention_mlp: all but the"
    " inputs of attention and of the MLP's last product; save_attention: the MLP as well;"
    " full: everything.",
    choices=("auto", "none", "save_attention_mlp", "save_attention", "full"),
    aliases={"mlp": "save_attention_mlp", "attention": "save_attention"},
  )
  scan_unroll: int = key(
    0,
    "Layers in each turn of the scan over layers; all of them: no scan.",
    least=1,
    most=2**16,
    special={
      0: "no scan on an accelerator, where that saves copies, but for remat full and gated adapters"
    },
  )
  head_chunk: int = key(
    2048, "Tokens that the output head works on at a time.", least=1, most=MOST_TOKENS
  )
  head_gradient: str = key(
    "auto",
    "How the head makes its gradients: in the forward pass (three matrix products), or by"
    " recomputing (four, less memory).",
    choices=("auto", "forward", "recompute"),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """The losses and their weights."""

  num_iterations: int = key(
    2,
    "Training rounds: the first denoises the noised response, each further one refines the last"
    " prediction.",
    least=1,
    most=1024,
  )
  loss_weights: tuple[float, ...] = key((1.0, 1.0), "The weight of each round's loss.", least=0)
  clean_weight: float = key(
    0.0,
    "The weight of the next-token loss on the clean text, next to the rounds. It keeps what the"
    " model can do one token at a time. It costs a pass of its own with noise.kind uniform, and"
    " nothing with block.",
    least=0,
  )

  draft_target: str = key(
    "kl",
    "What the drafts of a gated adapter learn: data: the text's next token; greedy: the base's most"
    " likely one; kl, tv: the base's distribution, by its divergence or by total variation.",
    choices=("data", "greedy", "kl", "tv"),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
  """How responses are noised."""

  kind: str = key(
    "uniform",
    "uniform: each response token with its example's rate; block: next to the clean text, the whole"
    " response in blocks as a block sampler sees them.",
    choices=("uniform", "block"),
  )
  block_size: int = key(
    8,
    "Tokens that a pass of the sampler may accept: the blocks of kind block, of validation and of"
    " eval.generate_every.",
    least=1,
    most=2**12,
  )
  offset_decay: float = key(
    1.0,
    "A draft's weight, over that of the one before it in a block: later ones are harder to guess.",
    above=0,
    most=1,
  )
  noise_min: float = key(
    0.1, "An example's rate is uniform in [noise_min, noise_max].", least=0, most=1
  )
  noise_max: float = key(0.9, "See noise.noise_min.", least=0, most=1)
  token: int = key(-1, "The id that replaces a noised token.", least=0, special={-1: "EOS"})
  random: bool = key(
    False, "Draw the noise of a gated adapter's drafts from the whole vocabulary instead."
  )
  anchors: int = key(
    0,
    "With noise.kind block, blocks of drafts for each row, drawn anew each step from all places of"
    " its responses, so that an example has them in proportion to its response; for long rows, a"
    " 64th of their tokens.",
    least=0,
    most=2**16,
    special={0: "all that tile the responses"},
  )

  @property
  def token_id(self) -> int | None:
    """The noise token, or None: EOS."""
    return None if self.token == -1 else self.token


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """A low-rank adapter, trained instead of all weights; the base stays as it is."""

  kind: str = key(
    "none",
    "none: all weights are trained; gated: an adapter that acts on noise tokens alone, so that the"
    " text is the base's; lora: one that acts on every token.",
    choices=("none", "gated", "lora"),
  )
  rank: int = key(128, "The rank of each matrix's change.", least=1, most=2**14)
  alpha: float = key(1024.0, "The change is multiplied by alpha / rank.", above=0)
  projections: tuple[str, ...] = key(
    ("query", "key", "value", "output", "gate", "up", "down"),
    "The projections that have a change.",
    choices=("query", "key", "value", "output", "gate", "up", "down"),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """Batches, steps and AdamW."""

  batch_size: int = key(
    64, "Rows (of max_length tokens) per step, over all devices.", least=1, most=MOST_ROWS
  )
  accumulation: int = key(
    1, "Micro-batches per step; the result does not depend on it.", least=1, most=MOST_ROWS
  )
  total_epochs: int = key(3, "Passes over the data.", least=1)
  total_steps: int = key(
    -1, "Optimizer steps.", least=1, special={-1: "as many as total_epochs give"}
  )
  lr: float = key(
    1e-5, "The highest learning rate; after the warm-up a cosine takes it to zero.", least=0
  )
  warmup_ratio: float = key(0.05, "The share of the steps with a linear warm-up.", least=0, below=1)
  betas: tuple[float, ...] = key(
    (0.9, 0.95), "Decay of the first and the second moment.", least=0, below=1
  )
  # Zero, or what float32 rounds to it, divides by zero where a gradient is zero.
  eps: float = key(1e-8, "Added to the root of the second moment.", least=1e-30)
  weight_decay: float = key(0.01, "Not applied to norms and biases.", least=0)
  clip_grad: float = key(
    1.0, "The largest global norm of a gradient.", least=0, special={0.0: "off"}
  )
  moment_dtype: str = key("float32", "Of Adam's first moment.", choices=("float32", "bfloat16"))
  max_nonfinite: int = key(
    5, "Steps in a row without a finite loss and gradient before the run stops.", least=1
  )

  @property
  def micro_batch(self) -> int:
    """Rows per micro-batch, over all devices."""
    return self.batch_size // self.accumulation

  @property
  def step_limit(self) -> int | None:
    """Optimizer steps, or None: as many as total_epochs give."""
    return None if self.total_steps == -1 else self.total_steps

  @property
  def clip_norm(self) -> float | None:
    """The largest global norm of a gradient, or None: not clipped."""
    return self.clip_grad or None


_LEFT = {-1: "all devices that are left"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis; one of them may be -1."""

  data: int = key(-1, "Rows are split, parameters copied.", least=1, special=_LEFT)
  fsdp: int = key(1, "Rows and parameters are split.", least=1, special=_LEFT)
  tensor: int = key(1, "Matrices are split.", least=1, special=_LEFT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A run's whole configuration."""

  # JAX keeps the low 32 bits of a seed: larger ones would draw what smaller ones draw.
  seed: int = key(
    0, "Everything random is a function of (seed, step, example).", least=0, most=2**32 - 1
  )
  data: DataConfig = DataConfig()
  model: ModelSource = ModelSource()
  objective: ObjectiveConfig = ObjectiveConfig()
  noise: NoiseConfig = NoiseConfig()
  adapter: AdapterConfig = AdapterConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  log: LogConfig = LogConfig()

  def to_dict(self) -> dict:
    """Plain dicts, lists and scalars, as JSON holds them."""
    return dataclasses.asdict(self)
