"""What a run does after a step, and which of it an earlier process left undone."""

import dataclasses
from pathlib import Path

import numpy as np

from refine_jax import processes, records
from refine_jax.config import Config

# A name that each kind of validation always writes.
_VALIDATED, _ANSWERED = "eval/loss_total", "eval/solved"


@dataclasses.dataclass(frozen=True)
class Duties:
  """What follows a step.

  Attributes:
    save: a checkpoint.
    export: the checkpoint as Hugging Face files.
    validate: the validation files.
    answer: the problems of eval.generate_file.
  """

  save: bool
  export: bool
  validate: bool
  answer: bool

  def __bool__(self) -> bool:
    return self.save or self.export or self.validate or self.answer


def is_due(every: int, step: int) -> bool:
  """Whether something done each `every` steps (0: never) is done after `step` steps."""
  return every > 0 and step % every == 0


def due(config: Config, step: int, *, total: int, validation: bool, stops: bool = False) -> Duties:
  """What follows step `step` of `total`.

  Args:
    validation: whether there are validation files.
    stops: whether the run is asked to stop here, which leaves the rest to the next start.
  """
  last = step == total
  rest = last or not stops
  save = last or stops or is_due(config.checkpoint.save_every, step)
  return Duties(
    save=save,
    export=save and config.checkpoint.save_hf,
    validate=rest and validation and (last or is_due(config.eval.eval_every, step)),
    answer=rest
    and config.eval.generate_every > 0
    and (last or is_due(config.eval.generate_every, step)),
  )


def missing(config: Config, workdir: Path, step: int, *, total: int, validation: bool) -> Duties:
  """What was due after the checkpoint of `step` and is not in the workdir; the same everywhere."""
  wanted = due(config, step, total=total, validation=validation)
  there = _recorded(workdir / records.NAME, step)
  exported = (workdir / f"global_step_{step}" / "huggingface").exists()
  undone = np.array(
    [
      config.checkpoint.save_hf and not exported,  # of every checkpoint
      wanted.validate and _VALIDATED not in there,
      wanted.answer and _ANSWERED not in there,
    ]
  )
  return Duties(False, *map(bool, processes.from_first(undone)))


def _recorded(path: Path, step: int) -> set[str]:
  """Names of the metrics that were written of this step."""
  return {name for record in records.read(path) if record["step"] == step for name in record}
