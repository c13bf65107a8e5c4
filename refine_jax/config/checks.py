"""Which values of a configuration make sense, one by one and together."""

import dataclasses
import difflib

from refine_jax.errors import UserError

_CHOICES = {
  "data.truncation": ("error", "left", "right"),
  "model.compute_dtype": ("float32", "bfloat16"),
  "model.attention": ("auto", "xla", "cudnn", "cudnn_packed", "splash"),
  # The last two are older names (model/remat.py).
  "model.remat": (
    "auto",
    "none",
    "save_attention_mlp",
    "save_attention",
    "full",
    "mlp",
    "attention",
  ),
  "noise.kind": ("uniform", "block"),
  "model.head_gradient": ("auto", "forward", "recompute"),
  "optim.moment_dtype": ("float32", "bfloat16"),
  "checkpoint.resume_mode": ("auto", "disable", "resume_path"),
}
# Smallest value that makes sense; keys that may also be -1 say so in configs/base.py.
_AT_LEAST = {
  "seed": 0,
  "data.max_length": 2,
  "data.max_segments": 1,
  "data.prefetch": 1,
  "model.scan_unroll": 0,
  "model.head_chunk": 1,
  "objective.num_iterations": 1,
  "objective.clean_weight": 0,
  "noise.block_size": 1,
  "noise.token": -1,
  "optim.batch_size": 1,
  "optim.accumulation": 1,
  "optim.total_epochs": 1,
  "optim.lr": 0,
  "optim.eps": 0,
  "optim.weight_decay": 0,
  "optim.clip_grad": 0,
  "optim.max_nonfinite": 1,
  "checkpoint.save_every": 1,
  "checkpoint.max_ckpt_to_keep": 1,
  "eval.eval_every": 0,
  "eval.batch_size": 0,
  "eval.generate_every": 0,
  "eval.generate_rows": 1,
  "eval.generate_tokens": 1,
  "log.every": 1,
  "log.debug_every": 0,
}
_LOGGERS = ("console", "tensorboard", "wandb")


def check(c):
  """Raises UserError at the first value, or pair of values, that makes no sense."""
  for name, choices in _CHOICES.items():
    value = _get(c, name)
    _require(
      value in choices,
      f"config.{name} is {value!r}; it is one of {', '.join(choices)}.{nearest(value, choices)}",
    )
  for name, least in _AT_LEAST.items():
    value = _get(c, name)
    _require(value >= least, f"config.{name} is {value}; it must be at least {least}.")
  rounds, weights = c.objective.num_iterations, c.objective.loss_weights
  _require(
    len(weights) == rounds,
    f"config.objective.loss_weights has {len(weights)} values and num_iterations is {rounds};"
    " give one weight a round.",
  )
  _require(
    all(w >= 0 for w in weights) and sum(weights) > 0,
    f"config.objective.loss_weights is {weights}; weights are not negative, and one is positive.",
  )
  _require(
    len(c.optim.betas) == 2 and all(0 <= b < 1 for b in c.optim.betas),
    f"config.optim.betas is {c.optim.betas}; it must be two numbers in [0, 1).",
  )
  _require(
    0 <= c.optim.warmup_ratio < 1,
    f"config.optim.warmup_ratio is {c.optim.warmup_ratio}; it must be in [0, 1).",
  )
  _require(
    c.optim.total_steps == -1 or c.optim.total_steps > 0,
    f"config.optim.total_steps is {c.optim.total_steps}; it must be positive, or -1: all epochs.",
  )
  _require(
    c.optim.batch_size % c.optim.accumulation == 0,
    f"config.optim.batch_size={c.optim.batch_size} is not divisible by"
    f" accumulation={c.optim.accumulation}.",
  )
  sizes = dataclasses.astuple(c.mesh)
  _require(
    all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
    f"config.mesh is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]};"
    " sizes are positive, and at most one is -1.",
  )
  for name in c.log.logger:
    _require(
      name in _LOGGERS,
      f"config.log.logger names {name!r}; known are {', '.join(_LOGGERS)}."
      f"{nearest(name, _LOGGERS)}",
    )
  _require(
    len(c.log.profile_steps) == 2 and c.log.profile_steps[0] <= c.log.profile_steps[1],
    f"config.log.profile_steps is {c.log.profile_steps}; it must be (first, last).",
  )
  _require(
    bool(c.eval.generate_file) == (c.eval.generate_every > 0),
    "config.eval.generate_every and config.eval.generate_file go together: how often, and which"
    " parquet file of problems.",
  )
  _require(bool(c.data.train_files), "config.data.train_files is empty; name a parquet file.")
  _require(
    bool(c.model.pretrained) != bool(c.model.config),
    "Set config.model.pretrained (start from weights) or config.model.config (from scratch),"
    " one of the two.",
  )
  _require(
    (c.checkpoint.resume_mode == "resume_path") == bool(c.checkpoint.resume_from_path),
    "config.checkpoint.resume_from_path goes with resume_mode='resume_path', and only with it.",
  )


def nearest(name: str, known) -> str:
  """' Did you mean ...?' for the known name most like `name`, or ''."""
  match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" Did you mean {match[0]!r}?" if match else ""


def _get(config, name):
  for part in name.split("."):
    config = getattr(config, part)
  return config


def _require(condition, message):
  if not condition:
    raise UserError(message)
