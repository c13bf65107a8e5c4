"""The rows of a run, and how many steps they make."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np
from jax.sharding import Mesh

from refine_jax import data, sharding
from refine_jax.batch import Batch
from refine_jax.config import Config
from refine_jax.config.checks import check_steps
from refine_jax.errors import UserError
from refine_jax.objective import draft_blocks
from refine_jax.training.source import ModelSource


class RowLimits(Protocol):
  """What choices of how to compute need to know of the rows."""

  @property
  def max_segments(self) -> int:
    """The most examples in any row."""
    ...

  def most_tiles(self, drafts: int) -> int:
    """The most blocks of `drafts` tokens that tile the responses of any row, in any epoch."""
    ...


@dataclasses.dataclass(frozen=True)
class DataPlan:
  """The rows of the run and how this process reads them."""

  config: Config
  train: data.Rows
  validation: data.Rows | None
  total_steps: int
  mesh: Mesh

  @property
  def max_segments(self) -> int:
    """The most examples in any row."""
    return max(rows.max_segments for rows in (self.train, self.validation) if rows)

  def most_tiles(self, drafts: int) -> int:
    """The most blocks of `drafts` tokens that tile the responses of any row, in any epoch."""
    return max(
      rows.most_in_a_row(draft_blocks.most_tiles(rows.examples.response_lengths, drafts))
      for rows in (self.train, self.validation)
      if rows
    )

  def fingerprint(self) -> str:
    """A checksum of the training examples: tokens, and where examples and responses begin."""
    examples, crc = self.train.examples, 0
    for array in (examples.tokens, examples.offsets, examples.prompt_lengths):
      crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return f"{len(examples)} examples {crc:08x}"

  def train_iterator(self) -> grain.DatasetIterator:
    """A grain iterator over batches of this process's rows, whose state can be saved."""
    return data.train_iterator(
      self.train,
      accumulation=self.config.optim.accumulation,
      held=sharding.local_rows(self.mesh, self.config.optim.micro_batch),
      prefetch=self.config.data.prefetch,
    )

  def eval_batches(self) -> Sequence[Batch]:
    assert self.validation is not None
    held = sharding.local_rows(self.mesh, self.validation.batch_size)
    return data.eval_batches(self.validation, held=held)

  def first_row(self, batch: int) -> Batch:
    """The first row of global batch `batch`, the same on every process: [1, T]."""
    return self.train.batch([batch * self.train.batch_size])


def plan_data(config: Config, source: ModelSource, mesh: Mesh) -> DataPlan:
  """Tokenises (or reads the cache), packs, and says how many steps the run has."""
  optim_config = config.optim
  eval_size = config.eval.batch_size or optim_config.micro_batch
  if eval_size % sharding.batch_shards(mesh):
    raise UserError(
      f"config.eval.batch_size={eval_size} is not divisible by the mesh's data x fsdp ="
      f" {sharding.batch_shards(mesh)}."
    )

  def examples(files, name):
    return data.load_examples(
      files, config.data, source.tokenizer, name=name, vocab_size=source.model.vocab_size
    )

  validation = None
  if config.data.val_files:
    validation = data.eval_rows(
      examples(config.data.val_files, "val"), config.data, batch_size=eval_size
    )
  rows = data.train_rows(
    examples(config.data.train_files, "train"),
    config.data,
    batch_size=optim_config.batch_size,
    total_epochs=optim_config.total_epochs,
    seed=config.seed,
  )
  total_steps = optim_config.step_limit
  if total_steps is None:
    total_steps = rows.num_batches
  elif total_steps > rows.num_batches:  # as many epochs as that takes
    epochs = -(-total_steps * optim_config.batch_size // rows.packing.rows)
    rows = dataclasses.replace(rows, total_epochs=epochs)
  check_steps(config, total_steps)
  return DataPlan(config, rows, validation, total_steps, mesh)
