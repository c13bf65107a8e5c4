"""What a training would do, without doing it: an example with its mask, shapes, memory, steps."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax import files, processes, sharding, target
from refine_jax.batch import Batch
from refine_jax.checkpoint.directory import checkpoint_directory, steps
from refine_jax.config import Config
from refine_jax.model import transformer
from refine_jax.objective import noise as noise_lib
from refine_jax.text.tokenizer import Tokenizer
from refine_jax.training import memory, startup
from refine_jax.training.choices import (
  bytes_per_device,
  choose_forward,
  make_adapter,
  trained_columns,
)
from refine_jax.training.data_plan import DataPlan, plan_data
from refine_jax.training.forward import ForwardConfig
from refine_jax.training.metrics import gibibytes
from refine_jax.training.source import ModelSource, read_source
from refine_jax.training.step_config import StepConfig
from refine_jax.training.workdir import check_workdir

# SGR codes of terminals, and what stands around a text where there are no colours.
_STYLES = {"prompt": ("2", "", ""), "response": ("32", "⟦", "⟧"), "noise": ("30;43", "▒", "▒")}
_LONGEST = 1200  # characters of a text


def run(config: Config, workdir: str | None) -> int:
  """Prints what the run would print before its first step, and an example; trains nothing.

  The cache of tokenised data is filled as the run does it; nothing else is written, and no weights
  are read.

  Args:
    workdir: looked at, where it is given: whether the run could have it, and where it would start.

  Raises:
    UserError: what the run would raise before it reads weights.
  """
  place = files.local_path(workdir, "--workdir").absolute() if workdir else None
  noise_lib.from_config(config.noise)
  if place:
    check_workdir(place, config)
  mesh = sharding.make_mesh(config.mesh)
  source = read_source(config, weights=False)
  shape = source.model
  sharding.check_fit(mesh, config.optim, shape.heads, shape.kv_heads, config.data.max_length)
  plan = plan_data(config, source, mesh)
  forward = choose_forward(config, shape, mesh, plan)
  step_config = startup.make_step_config(config, source, plan)
  state = startup.abstract_state(config, source, mesh)
  base = _base(source, forward) if forward.adapter else None
  lines = startup.describe(
    config, source, plan, step_config, forward, state, _origin(config, source, place), base
  )
  lines += _shapes(config, plan, forward)
  lines.append(_memory(config, plan, forward, state, base))
  if processes.is_first():
    print(*lines, "", *_sample(plan, source.tokenizer, step_config), sep="\n")
    print("\n--dry_run: nothing was trained or written but the cache of tokenised data")
  return 0


def _origin(config: Config, source: ModelSource, workdir: Path | None) -> str:
  found = steps(checkpoint_directory(workdir)) if workdir else []
  if found:
    return f"step {found[-1]} of {workdir}"
  if config.checkpoint.resume_mode == "resume_path":
    return config.checkpoint.resume_from_path
  where = f"on {source.directory}" if source.pretrained else "scratch"
  if make_adapter(config):
    return f"a new adapter {where}"
  return f"pretrained weights from {source.directory}" if source.pretrained else where


def _base(source: ModelSource, forward: ForwardConfig) -> dict:
  """The frozen base's arrays as shapes, in the computing dtype."""
  shapes = transformer.param_shapes(source.model)
  assert forward.mesh is not None
  places = sharding.shardings(shapes, forward.mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(forward.dtype), sharding=s), shapes, places
  )


def _rows(config: Config, forward: ForwardConfig) -> int:
  """Rows of a micro-batch on one device."""
  assert forward.mesh is not None
  return config.optim.micro_batch // sharding.batch_shards(forward.mesh)


def _shapes(config: Config, plan: DataPlan, forward: ForwardConfig) -> list[str]:
  rows, length = _rows(config, forward), config.data.max_length
  model, columns = forward.model, trained_columns(config, plan)
  drafts = f", drafts [{rows}, {columns}]" if config.adapter.kind == "gated" else ""
  noised = f", noised [{rows}, {columns}]" if not drafts else ""
  return [
    f"shapes        a micro-batch on a device: ids [{rows}, {length}]{noised}{drafts}, hidden"
    f" [{rows}, {columns}, {model.width}], logits [{config.model.head_chunk}, {model.vocab_size}]"
    " at a time"
  ]


def _memory(config, plan, forward, state, base) -> str:
  """The estimate by which model.remat=auto chooses, in its parts."""

  def size(tree):
    return bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree))

  item = jnp.dtype(forward.dtype).itemsize
  adapted = base is not None
  tokens = _rows(config, forward) * trained_columns(config, plan)
  kept = tokens * memory.saved_bytes_per_token(forward.model, forward.remat, item, adapted=adapted)
  most = tokens * memory.saved_bytes_per_token(forward.model, "none", item, adapted=adapted)
  if config.adapter.kind == "gated":
    clean = _rows(config, forward) * config.data.max_length
    kept += memory.kept_keys_values(forward.model, clean, item)
  trained = size(state.params)
  parts = {
    "the base": size(base) if adapted else 0,
    "state": size(state),
    "gradients and working copies": trained + trained // 4 * 2 * item,
    "activations": kept + most // forward.model.layers,
    "logits": config.model.head_chunk * forward.model.vocab_size * (4 * (1 + adapted) + item),
  }
  told = ", ".join(f"{gibibytes(n)} {name}" for name, n in parts.items() if n)
  room = target.memory()
  there = f"; the device has {gibibytes(room)}" if room else ""
  return f"estimate      {gibibytes(sum(parts.values()))} a device: {told}{there}"


def _sample(plan: DataPlan, tokenizer: Tokenizer, step_config: StepConfig) -> list[str]:
  """The first example of the first row: what is trained on, and how the first step noises it."""
  batch = plan.first_row(0)
  row = batch.map(lambda x: x[0])
  examples = int(row.segment_ids.max())
  mine = row.segment_ids == 1
  scored = mine & row.response_mask
  filled = int(np.sum(row.segment_ids > 0))
  prompt, response = int(np.sum(mine & ~scored)), int(np.sum(scored))
  lines = [
    f"sample        the first row: {examples} examples, {filled} of {len(row.ids)} slots filled;"
    f" its first example, number {row.example_ids[0]}: {prompt} tokens of prompt, {response} of"
    " response",
    f"colours       {styled('prompt', 'prompt')} {styled('response, trained on', 'response')}"
    f" {styled('noise', 'noise')}",
    f"t0            {_text(tokenizer, row.ids[mine & ~scored], 'prompt')}"
    f"{_text(tokenizer, row.ids[scored], 'response')}",
  ]
  drawn = _noise(batch, step_config)
  if drawn is not None:
    ids, is_noise = (x[scored] for x in drawn)
    cuts = np.flatnonzero(np.diff(is_noise)) + 1
    runs = zip(np.split(ids, cuts), np.split(is_noise, cuts), strict=True)
    pieces = [_text(tokenizer, part, "noise" if part_is[0] else "") for part, part_is in runs]
    share = float(np.mean(is_noise))
    lines.append(f"s0            {''.join(pieces)}  ({share:.0%} noise)")
  return lines


def _noise(batch: Batch, step_config: StepConfig):
  """(ids, is_noise) [T] of the first round; None where it is not drawn token by token."""
  if step_config.gated or noise_lib.from_config(step_config.noise).clean_text_inside:
    return None  # every response token is a draft: all of it would be noise
  key = jax.random.fold_in(jax.random.key(step_config.seed), 0)
  _, noised = noise_lib.add_noise(key, batch, step_config.noise, step_config.noise_token)
  return np.asarray(noised.ids[0]), np.asarray(noised.is_noise[0])


def _text(tokenizer: Tokenizer, ids: np.ndarray, style: str) -> str:
  """The tokens as one printable line, its middle left out where it is long."""
  text = tokenizer.decode(ids)
  if len(text) > _LONGEST:
    text = f"{text[: _LONGEST // 2]} [..] {text[-_LONGEST // 2 :]}"
  shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  return styled(shown, style)


def styled(text: str, style: str) -> str:
  """The text in a style's colour on a terminal without NO_COLOR, else between its marks."""
  if style not in _STYLES or not text:
    return text
  code, opens, closes = _STYLES[style]
  if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
    return f"\x1b[{code}m{text}\x1b[0m"
  return f"{opens}{text}{closes}"
