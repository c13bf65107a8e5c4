"""Checkpoints at WORKDIR/checkpoints/STEP: everything that Orbax does, in one file.

One holds the training state, the data iterator and a JSON record (run config, the model's shape).
A step's directory appears under its name only when it is complete.
"""

import logging
import shutil
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from refine_jax.errors import UserError

_DAMAGED = ".damaged"


def checkpoint_directory(workdir) -> Path:
  return Path(workdir).absolute() / "checkpoints"


def steps(directory: Path) -> list[int]:
  """The complete checkpoints in a checkpoints directory, oldest first."""
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdigit())


class Checkpointer:
  """Saves and restores one run's checkpoints. Saving goes on in the background."""

  def __init__(self, workdir, *, max_to_keep: int):
    self.directory = checkpoint_directory(workdir)
    self._max_to_keep = max_to_keep
    self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    # Made when first needed: it creates the directory, which a run that fails early must not.
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self._max_to_keep, enable_async_checkpointing=True
      )
      self._manager = ocp.CheckpointManager(self.directory, options=options)
    return self._manager

  def latest_step(self) -> int | None:
    return max(steps(self.directory), default=None)

  def save(self, step: int, state, iterator, config: dict, identity: dict):
    """Starts to save; returns when the state has been copied and may be donated.

    Args:
      state: any pytree of arrays.
      iterator: the grain iterator that has given exactly the batches trained on.
      config, identity: JSON: the run's config; what `restore` compares the model with.

    Raises:
      UserError: this save, or the one before, could not be written.
    """
    if step in steps(self.directory):
      return
    if jax.default_backend() == "cpu":
      # On a CPU "the copy to the host" is the device's own buffer, which the next step donates.
      state = jax.tree.map(lambda x: x.copy(), state)
    with _disk_errors(self.directory):
      self._open().save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=grain.checkpoint.CheckpointSave(iterator),
          record=ocp.args.JsonSave({"config": config, "identity": identity}),
        ),
      )

  def restore(self, step: int | None, abstract_state, iterator, identity: dict):
    """The newest checkpoint that can be read, or that of `step`.

    One that cannot be read is reported and set aside as STEP.damaged, and the one before tried.

    Args:
      abstract_state: the state's tree of jax.ShapeDtypeStruct with shardings.
      iterator: set to where it was.
      identity: must equal that of the checkpoint.

    Returns:
      (state, step)

    Raises:
      UserError: of another model, or none can be read.
    """
    candidates = [step] if step is not None else steps(self.directory)[::-1]
    for candidate in candidates:
      try:
        return self._restore(candidate, abstract_state, iterator, identity), candidate
      except UserError:
        raise
      except Exception as error:  # Orbax, TensorStore and JSON raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logging.warning("checkpoint %s cannot be read: %s", self.directory / str(candidate), reason)
        if step is None:
          self._set_aside(candidate)
    raise UserError(
      f"No checkpoint in {self.directory} can be read; see the warnings above."
      " Choose another --workdir to start anew."
    )

  def restore_from(self, path: str, abstract_state, iterator, identity: dict):
    """Restores from another run: a workdir, or WORKDIR/checkpoints/STEP, which stay untouched.

    Returns:
      (state, the checkpoint's path)
    """
    workdir, step = resolve_resume_path(path)
    other = Checkpointer(workdir, max_to_keep=self._max_to_keep)
    try:
      step = other.latest_step() if step is None else step
      state, step = other.restore(step, abstract_state, iterator, identity)
    finally:
      other.close()
    return state, other.directory / str(step)

  def _restore(self, step, abstract_state, iterator, identity):
    manager = self._open()
    found = _record(self.directory, step)["identity"]
    if found != identity:
      raise UserError(_different_model(self.directory, step, found, identity))
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state),
        data=grain.checkpoint.CheckpointRestore(iterator),
      ),
    )
    return restored.state

  def _set_aside(self, step):
    if jax.process_index() == 0:
      path = self.directory / str(step)
      path.rename(path.with_name(f"{step}{_DAMAGED}"))
    self._manager.close()
    self._manager = None

  def wait(self):
    """Until everything is on disk.

    Raises:
      UserError: it could not be written.
    """
    if self._manager is not None:
      with _disk_errors(self.directory):
        self._manager.wait_until_finished()

  def close(self):
    if self._manager is not None:
      try:
        self.wait()
      finally:
        manager, self._manager = self._manager, None
        manager.close()


def resolve_resume_path(path: str) -> tuple[Path, int | None]:
  """A workdir, or WORKDIR/checkpoints/STEP -> (workdir, step or None for the newest).

  Raises:
    UserError: there is no checkpoint.
  """
  place = Path(path).expanduser().absolute()
  if place.name.isdigit() and place.parent.name == "checkpoints" and place.is_dir():
    return place.parent.parent, int(place.name)
  if steps(checkpoint_directory(place)):
    return place, None
  raise UserError(
    f"{place} holds no checkpoint; give a workdir or WORKDIR/checkpoints/STEP"
    " (config.checkpoint.resume_from_path)."
  )


def find_step(workdir, step: int | None) -> int:
  """`step`, or the newest.

  Raises:
    UserError: it is not there; lists those that are.
  """
  directory = checkpoint_directory(workdir)
  there = steps(directory)
  if not there:
    raise UserError(f"{directory} holds no checkpoint.")
  if step is None:
    return there[-1]
  if step not in there:
    raise UserError(f"{directory} has no step {step}; it has {', '.join(map(str, there))}.")
  return step


def restore_params(workdir, step: int | None = None) -> tuple[dict, int]:
  """Only the parameters, as host arrays in their own dtype: (nested dict, step).

  Raises:
    UserError: no such checkpoint, or it cannot be read.
  """
  step = find_step(workdir, step)
  path = checkpoint_directory(workdir) / str(step) / "state"
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree["params"]
      item = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)}
      arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
      restored = checkpointer.restore(
        path, args=ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
      )
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
  return restored["params"], step


def saved_config(workdir, step: int | None = None) -> dict:
  """The run's config as it was when the checkpoint was written."""
  step = find_step(workdir, step)
  return _record(checkpoint_directory(workdir), step)["config"]


def _record(directory, step):
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    return checkpointer.restore(directory / str(step) / "record")


def _different_model(directory, step, found, wanted):
  different = [
    f"{name} {found.get(name)} there, {wanted.get(name)} here"
    for name in sorted(found.keys() | wanted.keys())
    if found.get(name) != wanted.get(name)
  ]
  return (
    f"{directory / str(step)} is of another model ({'; '.join(different[:3])});"
    " choose another --workdir or the model that it was made from."
  )


class _disk_errors:  # noqa: N801  used as a verb: with _disk_errors(path)
  """Errors of the file system as a UserError, with the room that is left."""

  def __init__(self, directory):
    self._directory = directory

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
      return
    text = str(error).splitlines()[0] if str(error) else kind.__name__
    full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
    if isinstance(error, OSError) or full:
      parent = next(p for p in (self._directory, *self._directory.parents) if p.exists())
      free = shutil.disk_usage(parent).free / 2**30
      raise UserError(
        f"The checkpoint in {self._directory} could not be written ({text}); {free:.1f} GiB are"
        " free there. Earlier checkpoints are whole: make room and start again."
      ) from error
