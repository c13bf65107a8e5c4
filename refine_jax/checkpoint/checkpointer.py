"""Checkpoints at WORKDIR/checkpoints/STEP: everything that Orbax does, in one file.

One holds the training state, the data iterator and a JSON record (run config, the model's shape,
checksums). A step's directory appears under its name only when it is complete; what a killed run
left of one has another name, and is deleted when the next run first saves.
"""

import contextlib
import logging
import shutil
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from refine_jax.checkpoint import checksums
from refine_jax.errors import UserError
from refine_jax.tree import leaf_name


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
    self._saving = False

  def latest_step(self) -> int | None:
    return max(steps(self.directory), default=None)

  def save(self, step: int, state, iterator, config: dict, identity: dict):
    """Starts to save; returns when the state has been copied and may be donated.

    A step that is there already is left as it is.

    Args:
      state: any pytree of arrays.
      iterator: the grain iterator that has given exactly the batches trained on.
      config, identity: JSON: the run's config; what `restore` compares the model with.

    Raises:
      UserError: this save, or the one before, could not be written.
    """
    self.wait()
    if step in steps(self.directory):
      return
    record = {"config": config, "identity": identity, "checksums": checksums.checksums(state)}
    if jax.default_backend() == "cpu":
      # On a CPU "the copy to the host" is the device's own buffer, which the next step donates.
      state = jax.tree.map(lambda x: x.copy(), state)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=grain.checkpoint.CheckpointSave(iterator),
      record=ocp.args.JsonSave(record),
    )
    with _disk_errors(self.directory):
      self._open().save(step, args=args, force=True)  # when to save is the caller's business
    self._saving = True

  def _open(self) -> ocp.CheckpointManager:
    # Made when first needed: it creates the directory, which a run that fails early must not.
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self._max_to_keep, cleanup_tmp_directories=True
      )
      self._manager = ocp.CheckpointManager(self.directory, options=options)
    return self._manager

  def restore(self, step: int | None, abstract_state, iterator, identity: dict):
    """The newest checkpoint that can be read, or that of `step`.

    One that cannot be read is reported, and the one before tried; when that succeeds, those
    damaged are set aside as STEP.damaged, to make room for their steps.

    Args:
      abstract_state: the state's tree of jax.ShapeDtypeStruct with shardings.
      iterator: set to where it was.
      identity: must equal that of the checkpoint.

    Returns:
      (state, step)

    Raises:
      UserError: of another model or optimizer, or none can be read.
    """
    state, found, damaged = _restore_first(self.directory, step, abstract_state, iterator, identity)
    for path in damaged:
      _set_aside(path)
    return state, found

  def restore_from(self, path: str, abstract_state, iterator, identity: dict):
    """Restores from another run: a workdir, or WORKDIR/checkpoints/STEP, which stay untouched.

    Returns:
      (state, the checkpoint's path)
    """
    workdir, step = resolve_resume_path(path)
    directory = checkpoint_directory(workdir)
    state, found, _ = _restore_first(directory, step, abstract_state, iterator, identity)
    return state, directory / str(found)

  def check(self):
    """Whether a save that has ended in the background was written; returns at once.

    Raises:
      UserError: it could not be written.
    """
    if self._saving and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self):
    """Until everything is on disk.

    Raises:
      UserError: it could not be written.
    """
    if self._saving:
      self._saving = False
      with _disk_errors(self.directory):
        self._manager.wait_until_finished()

  def close(self):
    """Waits as `wait` does, and gives back threads."""
    try:
      self.wait()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        manager.close()


def _restore_first(directory, step, abstract_state, iterator, identity):
  """The newest that can be read, or `step`: (state, step, paths of newer ones that cannot)."""
  damaged, reason = [], "none"
  for candidate in steps(directory)[::-1] if step is None else [step]:
    path = directory / str(candidate)
    try:
      return _restore(path, abstract_state, iterator, identity), candidate, damaged
    except UserError:
      raise
    except Exception as error:  # Orbax, TensorStore and JSON raise many kinds
      reason = f"{path} cannot be read: {_reason(error)}"
      logging.warning("checkpoint %s", reason)
      damaged.append(path)
  raise UserError(
    f"No checkpoint in {directory} can be read ({reason}). Nothing was changed; mend it, or"
    " choose another --workdir to start anew."
  )


def _restore(path, abstract_state, iterator, identity):
  record = _read(path).record
  if record["identity"] != identity:
    raise UserError(_different_model(path, record["identity"], identity))
  leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
  different = sorted({leaf_name(p) for p, _ in leaves} ^ record["checksums"].keys())
  if different:
    raise UserError(
      f"{path} was written with another optimizer: {different[0]} is only in one of the two;"
      " set config.optim (clip_grad, weight_decay) as in its run, or choose another --workdir."
    )
  restored = _read(
    path,
    state=ocp.args.StandardRestore(abstract_state),
    data=grain.checkpoint.CheckpointRestore(iterator),
  )
  checksums.verify(restored.state, record["checksums"])
  return restored.state


def _set_aside(path: Path):
  if jax.process_index() == 0:
    others = len(list(path.parent.glob(f"{path.name}.damaged*")))
    path.rename(path.with_name(f"{path.name}.damaged" + (f"-{others}" if others else "")))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"set aside {path}")


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
  path = checkpoint_directory(workdir) / str(step)
  try:
    tree = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree["params"]
    item = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)}
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
    restored = _read(path, state=args)
    checksums.verify(restored.state, restored.record["checksums"])
  except Exception as error:  # Orbax, TensorStore and JSON raise many kinds
    raise UserError(f"{path} cannot be read ({_reason(error)}); try another step.") from error
  return restored.state["params"], step


def saved_config(workdir, step: int | None = None) -> dict:
  """The run's config as it was when the checkpoint was written."""
  path = checkpoint_directory(workdir) / str(find_step(workdir, step))
  return _read(path).record["config"]


def _read(path, **items):
  """The record of the checkpoint at `path`, and these items."""
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(path, ocp.args.Composite(record=ocp.args.JsonRestore(), **items))


def _different_model(path, found, wanted):
  different = [
    f"{name} {found.get(name)} there, {wanted.get(name)} here"
    for name in sorted(found.keys() | wanted.keys())
    if found.get(name) != wanted.get(name)
  ]
  return (
    f"{path} is of another model ({'; '.join(different[:3])});"
    " choose another --workdir or the model that it was made from."
  )


def _reason(error: Exception) -> str:
  """The first line of what a library said, without TensorStore's specification."""
  line = f"{type(error).__name__}: {error}".splitlines()[0]
  for tail in (" [tensorstore_spec", " See full TensorStore details"):
    line = line.split(tail)[0]
  # TensorStore puts the cause last, after each layer that it went through.
  return line if len(line) <= 300 else f"{line[:100]} ... {line[-180:]}"


@contextlib.contextmanager
def _disk_errors(directory):
  """Errors of the file system as a UserError, with the room that is left."""
  try:
    yield
  except Exception as error:
    if not isinstance(error, OSError) and "os_error_code" not in str(error):
      raise
    parent = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(parent).free / 2**30
    raise UserError(
      f"The checkpoint in {directory} could not be written ({_reason(error)}); {free:.1f} GiB are"
      " free there. Earlier checkpoints are whole: make room and start again."
    ) from error
