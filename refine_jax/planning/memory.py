"""What a step takes of a device's memory, as its compiler counts it."""

import dataclasses
from typing import Any

import jax

from refine_jax.planning.program import Step
from refine_jax.training import choices


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    parameters, optimizer, base: what stays there: masters, moments, the frozen base of an adapter.
    temporaries: what the step needs besides; None: it does not fit, and was not compiled.
    peak: the most at any time; None likewise.
    room: what a process may take; None: not known.
    refused: the compiler's reason, where it has found no way to fit it in.
  """

  parameters: int
  optimizer: int
  base: int
  temporaries: int | None
  peak: int | None
  room: int | None
  refused: str = ""

  @property
  def fits(self) -> bool | None:
    """Whether it does; None where the room is not known."""
    if self.refused:
      return False
    return None if self.room is None or self.peak is None else self.peak <= self.room


def read(step: Step, compiled: Any, room: int | None, refused: str = "") -> Memory:
  """What a step takes of a device.

  Args:
    compiled: its executable; None: it does not fit, as `refused` says.
    room: see Memory.
  """
  state = step.state
  parameters, optimizer, base = (
    choices.bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree))
    for tree in (state.params, state.opt_state, step.frozen or {})
  )
  if compiled is None:
    return Memory(parameters, optimizer, base, None, None, room, refused)
  analysis = compiled.memory_analysis()
  kept = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  # A GPU's runtime takes temporaries as one block, whatever of them lives at one time.
  peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + max(kept, 0)
  if step.mesh.devices.flat[0].platform == "tpu":
    peak = analysis.peak_memory_in_bytes
  return Memory(parameters, optimizer, base, analysis.temp_size_in_bytes, peak, room)
