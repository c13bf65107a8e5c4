"""Rules between the keys of a configuration; those of one key are declared with it, in schema."""

from refine_jax.config.schema import Config, MeshConfig
from refine_jax.errors import UserError

# Positions in a batch are int32 on the device.
_MOST_TOKENS = 2**31 - 1


def check(c: Config) -> None:
  """Raises UserError at the first values that contradict each other."""
  _check_source(c)
  _check_objective(c)
  _check_adapter(c)
  _check_batches(c)
  _check_mesh(c.mesh)
  first, last = _pair(c.log.profile_steps, "log.profile_steps", "(first, last)")
  if c.optim.step_limit is not None:
    check_steps(c, c.optim.step_limit)
  _require(
    first <= last and (first > 0 or last == 0),
    f"config.log.profile_steps is {c.log.profile_steps}; it must be (first, last), from step 1 on,"
    " or (0, 0).",
  )
  _require(
    bool(c.eval.generate_file) == (c.eval.generate_every > 0),
    "config.eval.generate_every and config.eval.generate_file go together: how often, and which"
    " parquet file of problems.",
  )
  _require(
    (c.checkpoint.resume_mode == "resume_path") == bool(c.checkpoint.resume_from_path),
    "config.checkpoint.resume_from_path goes with resume_mode='resume_path', and only with it.",
  )


def check_steps(c: Config, total_steps: int) -> None:
  """Raises UserError for more steps than can be counted, or a log.profile_steps beyond them."""
  _require(
    total_steps < 2**31,
    f"config.optim.total_epochs={c.optim.total_epochs} makes {total_steps} steps, and a run has at"
    f" most {2**31 - 1}; lower it, or set config.optim.total_steps.",
  )
  _require(
    c.log.profile is None or 1 <= c.log.profile[0] <= c.log.profile[1] <= total_steps,
    f"config.log.profile_steps={c.log.profile_steps} is outside the run's steps 1 to {total_steps};"
    " set (first, last) in them, or (0, 0) for none.",
  )


def _check_source(c):
  _require(bool(c.data.train_files), "config.data.train_files is empty; name a parquet file.")
  _require(
    bool(c.model.pretrained) != bool(c.model.config),
    "Set config.model.pretrained (start from weights) or config.model.config (from scratch),"
    " one of the two.",
  )


def _check_objective(c):
  rounds, weights = c.objective.num_iterations, c.objective.loss_weights
  _require(
    len(weights) == rounds,
    f"config.objective.loss_weights has {len(weights)} values and num_iterations is {rounds};"
    " give one weight per round.",
  )
  _require(
    sum(weights) > 0,
    f"config.objective.loss_weights is {weights}; at least one of them must be positive.",
  )
  low, high = c.noise.noise_min, c.noise.noise_max
  _require(
    low <= high,
    f"config.noise has noise_min={low} and noise_max={high};"
    " they must satisfy 0 <= noise_min <= noise_max <= 1.",
  )
  _require(
    c.noise.kind != "block" or c.noise.block_size > 1,
    "config.noise.block_size is 1: such blocks have no drafts to train; make it at least 2.",
  )
  _pair(c.optim.betas, "optim.betas", "two numbers in [0, 1)")


def _check_adapter(c):
  kind = c.adapter.kind
  _require(
    kind != "gated" or (c.noise.kind == "block" and c.objective.clean_weight == 0),
    f"config.adapter.kind='gated' trains drafts alone: set noise.kind='block' (it is"
    f" {c.noise.kind!r}) and objective.clean_weight=0 (it is {c.objective.clean_weight}).",
  )
  _require(
    kind != "gated" or (c.objective.num_iterations == 1 and c.objective.loss_weights == (1.0,)),
    "config.adapter.kind='gated' has one loss, of its drafts: set objective.num_iterations=1 (it is"
    f" {c.objective.num_iterations}) and objective.loss_weights=(1.0,) (it is"
    f" {c.objective.loss_weights}).",
  )
  _require(
    kind != "gated" or c.model.head_gradient != "recompute",
    "config.model.head_gradient='recompute' saves nothing with adapter.kind='gated', whose head has"
    " no gradient; leave it at 'auto'.",
  )
  _require(
    not c.noise.anchors or c.noise.kind == "block",
    f"config.noise.anchors={c.noise.anchors} counts blocks, and noise.kind is {c.noise.kind!r};"
    " leave it at 0, or set noise.kind='block'.",
  )
  if kind != "gated":
    for name, section, key in (
      ("objective.draft_target", c.objective, "draft_target"),
      ("noise.random", c.noise, "random"),
    ):
      value, default = getattr(section, key), getattr(type(section)(), key)
      _require(
        value == default,
        f"config.{name}={value!r} is for adapter.kind='gated' alone (it is {kind!r}); leave it at"
        f" {default!r}.",
      )
  _require(
    kind == "none" or bool(c.model.pretrained),
    f"config.adapter.kind={kind!r} needs a base with weights; set config.model.pretrained.",
  )
  _require(
    kind == "none" or bool(c.adapter.projections),
    "config.adapter.projections is empty; name at least one projection.",
  )


def _check_batches(c):
  batch, length = c.optim.batch_size, c.data.max_length
  _require(
    batch % c.optim.accumulation == 0,
    f"config.optim.batch_size={batch} is not divisible by accumulation={c.optim.accumulation}.",
  )
  block = c.noise.kind == "block"
  most = _MOST_TOKENS
  if block and c.noise.anchors:
    most -= batch * c.noise.anchors * c.noise.block_size
  elif block:
    most //= 2
  _require(
    batch * length <= most,
    f"config.optim.batch_size={batch} rows of config.data.max_length={length} tokens are more than"
    f" a step can count{' with noise.kind block' * block} ({max(most, 0)}); lower one of them.",
  )
  _require(
    c.eval.batch_size * length * (1 + block) <= _MOST_TOKENS,
    f"config.eval.batch_size={c.eval.batch_size} rows of config.data.max_length={length} tokens are"
    " more than a batch can count; lower one of them.",
  )


def _check_mesh(mesh: MeshConfig):
  _require(
    (mesh.data, mesh.fsdp, mesh.tensor).count(-1) <= 1,
    f"config.mesh is data={mesh.data}, fsdp={mesh.fsdp}, tensor={mesh.tensor};"
    " sizes are positive, and at most one is -1.",
  )


def _pair(value, name, wanted):
  _require(len(value) == 2, f"config.{name} is {value}; it must be {wanted}.")
  return value


def _require(condition, message):
  if not condition:
    raise UserError(message)
