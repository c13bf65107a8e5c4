"""The keys of what happens between the steps of a run; `schema` has the others."""

import dataclasses

from refine_jax.config.key import MOST_ROWS, MOST_TOKENS, key


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """What is saved, and where a run starts from."""

  save_every: int = key(
    1000, "Optimizer steps between checkpoints; the last step is always kept.", least=1
  )
  max_ckpt_to_keep: int = key(3, "Checkpoints kept; older ones are deleted.", least=1)
  resume_mode: str = key(
    "auto",
    "auto: go on from the workdir's newest checkpoint; disable: refuse a used workdir; resume_path:"
    " start from checkpoint.resume_from_path.",
    choices=("auto", "disable", "resume_path"),
  )
  resume_from_path: str = key(
    "", "For resume_path: a workdir (its newest checkpoint) or WORKDIR/checkpoints/STEP."
  )
  allow_changes: tuple[str, ...] = key(
    (),
    "What may differ from the checkpoint that a run goes on from, by the names that its refusal"
    " gives: ('data',) for other examples, ('optim.total_steps',) for a longer run.",
  )
  save_hf: bool = key(
    False,
    "Also write each as Hugging Face files to WORKDIR/global_step_N/huggingface. These are"
    " releases: max_ckpt_to_keep does not delete them.",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """Validation and answered problems while a run goes on."""

  eval_every: int = key(
    200, "Steps between validations, also at the end.", least=1, special={0: "only at the end"}
  )
  batch_size: int = key(
    0,
    "Rows per validation batch.",
    least=1,
    most=MOST_ROWS,
    special={0: "those of a training micro-batch"},
  )
  generate_every: int = key(
    0,
    "Optimizer steps between answering problems (columns data.prompt_key and answer), also at the"
    " end, in blocks of noise.block_size, mode exact. Every process answers all of them, on"
    " one of its devices.",
    least=1,
    special={0: "never"},
  )
  generate_file: str = key("", "A parquet file of problems, for eval.generate_every.")
  generate_rows: int = key(64, "Problems answered: the first so many.", least=1)
  generate_tokens: int = key(256, "New tokens at most.", least=1, most=MOST_TOKENS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """Metrics, examples as text, profiles."""

  every: int = key(1, "Steps between lines of metrics.", least=1)
  debug_every: int = key(
    100,
    "Steps between examples shown as text in WORKDIR/log/debug.log.",
    least=1,
    special={0: "none"},
  )
  logger: tuple[str, ...] = key(
    ("console", "tensorboard"),
    "Where metrics go; metrics.jsonl is always written.",
    choices=("console", "tensorboard", "wandb"),
  )
  project_name: str = key("refine_jax", "For wandb.")
  experiment_name: str = key("", "For wandb.")
  profile_steps: tuple[int, ...] = key(
    (0, 0), "First and last step to profile, to WORKDIR/profile; (0, 0): none.", least=0
  )

  @property
  def profile(self) -> tuple[int, int] | None:
    """First and last step to profile, or None."""
    first, last = self.profile_steps
    return (first, last) if last else None
