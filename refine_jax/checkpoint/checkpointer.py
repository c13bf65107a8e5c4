"""Checkpoints at WORKDIR/checkpoints/STEP: everything that Orbax does, in one file.

One holds the training state and a JSON record (run config, the model's shape, what makes the run,
the position in the data, checksums), whatever the number of processes. A step's directory appears
under its name only when it is complete; what a killed run left of one has another name, and is
deleted when the next run first saves.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from grain import DatasetIterator

from refine_jax import processes
from refine_jax.checkpoint import checksums, compare
from refine_jax.checkpoint.directory import (
  Disk,
  check_writable_name,
  checkpoint_directory,
  delete_all_but,
  find_step,
  position,
  read_newest,
  refuse_taken,
  resolve_resume_path,
  set_aside,
  steps,
)
from refine_jax.checkpoint.quiet import quiet_threads
from refine_jax.errors import UserError
from refine_jax.quoting import reason
from refine_jax.tree import leaf_name


class Checkpointer:
  """Saves and restores one run's checkpoints. Saving goes on in the background.

  Raises:
    UserError: what would be saved in this workdir could not be read again.
  """

  def __init__(self, workdir: str | Path, *, max_to_keep: int) -> None:
    self.directory = checkpoint_directory(workdir)
    check_writable_name(self.directory)
    self._max_to_keep, self._disk = max_to_keep, Disk(self.directory)
    self._manager: ocp.CheckpointManager | None = None
    self._saving: int | None = None  # the step

  def latest_step(self) -> int | None:
    return max(steps(self.directory), default=None)

  def has_any(self) -> bool:
    """Whether there is a checkpoint, as the first process sees it; all must call it."""
    return bool(processes.from_first(self.latest_step() is not None))

  def save(
    self,
    step: int,
    state: Any,
    iterator: DatasetIterator,
    config: dict,
    identity: dict,
    *,
    run: dict | None = None,
  ) -> None:
    """Starts to save; returns when the state has been copied and may be donated.

    A step that is there already is left as it is.

    Args:
      state: any pytree of arrays.
      iterator: the grain iterator that has given exactly the batches trained on.
      config, identity, run: JSON: the run's config; what `restore` compares the model with, and
        the run.

    Raises:
      UserError: this save, or the one before, could not be written.
    """
    self.wait()
    if processes.from_first(step in steps(self.directory)):
      return
    refuse_taken(self.directory / str(step))
    record = {
      "config": config,
      "identity": identity,
      "run": run or {},
      "position": iterator.get_state(),
      "checksums": checksums.checksums(state),
    }
    if jax.default_backend() == "cpu":
      # On a CPU "the copy to the host" is the device's own buffer, which the next step donates.
      state = jax.tree.map(lambda x: x.copy(), state)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      record=ocp.args.JsonSave(record | {"crc": _crc(record)}),
    )
    with self._disk.errors():
      self._open().save(step, args=args, force=True)  # when to save is the caller's business
    self._saving = step

  def _open(self) -> ocp.CheckpointManager:
    # Made when first needed: it creates the directory, which a run that fails early must not.
    if self._manager is None:
      quiet_threads()
      # Old ones are deleted here (_finish), when the new one can be read.
      options = ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
      self._manager = ocp.CheckpointManager(self.directory, options=options)
    return self._manager

  def restore(
    self,
    step: int | None,
    abstract_state: Any,
    iterator: DatasetIterator,
    identity: dict,
    *,
    run: dict | None = None,
    allow: tuple[str, ...] = (),
    check: Callable | None = None,
  ) -> tuple[Any, int]:
    """The newest checkpoint that can be read, or that of `step`.

    One that cannot be read is reported, and the one before tried; when that succeeds, those
    damaged are set aside as STEP.damaged, to make room for their steps. Of several processes the
    first one chooses, and a checkpoint is damaged where none of them can read it.

    Args:
      abstract_state: the state's tree of jax.ShapeDtypeStruct with shardings.
      iterator: set to where it was.
      identity: must equal that of the checkpoint.
      run: must equal that of the checkpoint, but for the names in `allow`.
      check: called with (step, state, iterator); raises ValueError where they do not belong
        together, which is damage.

    Returns:
      (state, step)

    Raises:
      UserError: of another model, optimizer or run, or none can be read, or only some processes
        can read it.
    """
    state, found, damaged = _restore(
      self.directory, step, abstract_state, iterator, identity, run=run, allow=allow, check=check
    )
    with processes.together():
      for path in damaged if processes.is_first() else ():
        set_aside(path)
    return state, found

  def restore_from(
    self, path: str, abstract_state: Any, iterator: DatasetIterator, identity: dict, **compared: Any
  ) -> tuple[Any, Path]:
    """Restores from another run: a workdir, or WORKDIR/checkpoints/STEP, which stay untouched.

    Args:
      compared: `run`, `allow` and `check`, as for `restore`.

    Returns:
      (state, the checkpoint's path)
    """
    with processes.together():
      workdir, step = resolve_resume_path(path)
    directory = checkpoint_directory(workdir)
    state, found, _ = _restore(directory, step, abstract_state, iterator, identity, **compared)
    return state, directory / str(found)

  def check(self) -> None:
    """Whether a save that has ended in the background was written; returns at once.

    Raises:
      UserError: it could not be written, or not be opened again.
    """
    if self._saving is not None and not self._open().is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Until everything is on disk, and can be opened again: only then are older ones deleted.

    Raises:
      UserError: it could not be written, or not be opened again.
    """
    if self._saving is None:
      return
    path, self._saving = self.directory / str(self._saving), None
    with self._disk.errors():
      self._open().wait_until_finished()
    _open_again(path)
    if processes.is_first():
      with self._disk.errors():
        delete_all_but(self.directory, self._max_to_keep)

  def close(self) -> None:
    """Waits as `wait` does, and gives back threads."""
    try:
      self.wait()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        with self._disk.errors(again=True):
          manager.close()


def _open_again(path):
  """Raises UserError where the record or an array's place in the files cannot be read."""
  try:
    record = _read(path).record
    names = {leaf_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(_metadata(path))}
    missing = sorted(record["checksums"].keys() - names)
    if missing:
      raise ValueError(f"{missing[0]} is not in it")
  except Exception as error:  # Orbax, TensorStore and JSON raise many kinds
    raise UserError(
      f"The checkpoint {path} was written and cannot be opened again ({reason(error)}); it does"
      " not count as saved. Earlier checkpoints are whole: start again from them, in another place"
      " if this one does it again."
    ) from error


def _restore(directory, step, abstract_state, iterator, identity, run=None, allow=(), check=None):
  """What read_newest gives: (state, its step, paths of newer ones that are damaged)."""
  leaves = {leaf_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(abstract_state)}

  def read(path):
    record = _read(path).record
    compare.refuse_others(path, record, identity, leaves, run or {}, allow)
    restored = _read(path, state=ocp.args.StandardRestore(abstract_state))
    return record, position(path, record), restored.state

  def verify(path, parts):  # all processes together: sums go over the parts of all
    record, place, state = parts
    checksums.verify(state, record["checksums"])
    iterator.set_state(place)
    if check is not None:
      check(int(path.name), state, iterator)
    return state

  return read_newest(directory, step, read, verify)


def restore_params(workdir: str | Path, step: int | None = None) -> tuple[dict, int]:
  """Only the parameters, as host arrays in their own dtype: (nested dict, step).

  Raises:
    UserError: no such checkpoint, or it cannot be read.
  """
  step = find_step(workdir, step)
  path = checkpoint_directory(workdir) / str(step)
  try:
    tree = _metadata(path)["params"]
    item = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)}
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
    restored = _read(path, state=args)
    checksums.verify(restored.state, restored.record["checksums"])
  except Exception as error:  # Orbax, TensorStore and JSON raise many kinds
    raise UserError(f"{path} cannot be read ({reason(error)}); try another step.") from error
  return restored.state["params"], step


def saved_record(workdir: str | Path, step: int | None = None) -> dict:
  """The JSON that a checkpoint was written with: "config", "identity" and more."""
  path = checkpoint_directory(workdir) / str(find_step(workdir, step))
  return _read(path).record


def _read(path, **items):
  """The record of the checkpoint at `path`, and these items.

  Raises:
    ValueError: the record is not what was saved.
  """
  # Each process for itself: one that fails must not leave the others waiting.
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(own, {own}, f"process_{own}")
  handler = ocp.CompositeCheckpointHandler(
    composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
  )
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
    args = ocp.args.Composite(record=ocp.args.JsonRestore(), **items)
    restored = checkpointer.restore(path, args)
  # Checkpoints of earlier releases have none.
  crc = restored.record.pop("crc", None)
  if crc is not None and crc != _crc(restored.record):
    raise ValueError("its record is not what was saved")
  return restored


def _metadata(path):
  """The tree of the arrays of the checkpoint at `path`, with shapes and dtypes."""
  return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def _crc(record: dict) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())
