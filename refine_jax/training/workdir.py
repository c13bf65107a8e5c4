"""A run's workdir: whether it is one, who holds it, and the files that a start writes there."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from refine_jax import files, lock, processes
from refine_jax.checkpoint.directory import check_writable_name, checkpoint_directory, steps
from refine_jax.config import Config
from refine_jax.errors import UserError
from refine_jax.hf import model_files
from refine_jax.objective import noise
from refine_jax.quoting import reason, some
from refine_jax.training.source import ModelSource

_LOCK = ".lock"
# What a directory may hold and still be new: the lock, what a killed start left, and logs, because
# a batch system writes its own before the run starts.
_NEW = re.compile(r"\.lock|\..*\.\d+\.new|\.gitkeep|\.DS_Store|.*\.(log|out|err)")
_FOLDERS = {"checkpoints", "log", "profile", "tensorboard"}
_SECTIONS = {"data", "model", "objective", "noise", "optim"}


def check_workdir(workdir: Path, config: Config) -> None:
  """Refuses, before anything is read or made, what cannot be this run's workdir.

  Raises:
    UserError: Orbax could not read its path, it is no directory or not a run's, or it is used and
      the config says not to go on from it.
  """
  directory = checkpoint_directory(workdir)
  check_writable_name(directory)
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"--workdir={workdir} is a file; name a directory.")
  if not workdir.is_dir():
    return
  with files.write_errors(workdir):
    strange = sorted(
      p.name for p in workdir.iterdir() if not (_NEW.fullmatch(p.name) or _is_made_ready(p))
    )
  if strange and not steps(directory) and read_config(workdir) is None:
    raise UserError(
      f"--workdir={workdir} is not of a run and holds {some(strange)}; name a directory of its own"
      " for each run, which is made where it is missing."
    )
  used = directory.is_dir() and any(directory.iterdir())
  if used and config.checkpoint.resume_mode == "disable":
    raise UserError(
      f"{workdir} holds checkpoints and config.checkpoint.resume_mode is 'disable';"
      " choose another --workdir, or resume_mode='auto' to go on from them."
    )


def _is_made_ready(path: Path) -> bool:
  """Whether it is an empty directory of a run's, or a link to one: another disk for checkpoints."""
  return path.name in _FOLDERS and path.is_dir() and not any(path.iterdir())


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[lock.Lock | None]:
  """Makes the workdir and keeps other processes out of it during the block.

  Gives the lock, None in processes that do not hold it.

  Of a job of several processes the first one holds it. A workdir that is still empty at the end,
  after a start that failed, is removed.

  Raises:
    UserError: it cannot be made, or another process holds it, which is named.
  """
  with contextlib.ExitStack() as stack:
    with processes.together():
      held = stack.enter_context(_hold(workdir)) if processes.is_first() else None
    yield held


@contextlib.contextmanager
def _hold(workdir: Path) -> Iterator[lock.Lock]:
  made = [p for p in (workdir, *workdir.parents) if not p.exists()]
  try:
    with files.write_errors(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
    with lock.lock(workdir / _LOCK, f"--workdir={workdir}") as held:
      yield held
  finally:
    with contextlib.suppress(OSError):  # not empty, or not made
      for path in made:
        path.rmdir()


def check_held(workdir: Path, held: lock.Lock | None) -> None:
  """Looks whether the workdir is still there, and makes it anew where it is not.

  Args:
    held: what `hold` gave.

  Raises:
    UserError: it was removed, moved or replaced.
    lock.InUseError: and another process holds what is there now.
  """
  if held is not None and not held.keep():
    raise UserError(
      f"--workdir={workdir} was removed or moved while the run went on, and was made anew for a"
      " last checkpoint."
    )


def read_config(workdir: Path) -> dict | None:
  """WORKDIR/config.json, or None where there is none or it is of something else, such as a model.

  Raises:
    UserError: it cannot be read.
  """
  path = workdir / "config.json"
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path} cannot be read ({reason(error)}); mend it or move it elsewhere."
    ) from None
  return config if isinstance(config, dict) and config.keys() >= _SECTIONS else None


def prepare_workdir(
  workdir: Path, config: Config, source: ModelSource, noise_token: int, *, step: int
) -> list[str]:
  """Writes the run's config and the model's files, which exports need.

  Args:
    step: where the run goes on; changes of the config are kept in its history under it.

  Returns:
    a line for each value of the config that an earlier start had otherwise.
  """
  if not processes.is_first():
    return []
  before, now = read_config(workdir), json.loads(json.dumps(config.to_dict()))
  history = before.pop("history", []) if before else []
  changed = changes(before or now, now)
  if changed or before is None:
    history += [{"step": step, "changed": changed}] if changed else []
    files.write_json(workdir / "config.json", now | ({"history": history} if history else {}))
  _write_model_files(workdir / "model", config, source, noise_token, anew=bool(changed))
  if changed:
    _set_exports_aside(workdir, step)
  return [
    f"changed       {name} {old} -> {new} (config.json keeps both)"
    for name, (old, new) in changed.items()
  ]


def changes(before: dict, now: dict, prefix: str = "") -> dict:
  """{"section.key": [value before, value now]} of the keys that differ."""
  result = {}
  for key in sorted(before.keys() | now.keys()):
    old, new = before.get(key), now.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
      result |= changes(old, new, f"{prefix}{key}.")
    elif old != new:
      result[prefix + key] = [old, new]
  return result


def _set_exports_aside(workdir: Path, step: int):
  """Makes room for the exports of steps that are taken again, with another result."""
  for path in workdir.glob("global_step_*"):
    number = path.name.removeprefix("global_step_")
    if re.fullmatch(r"[0-9]+", number) and int(number) > step:
      others = len(list(workdir.glob(f"{path.name}.replaced*")))
      path.rename(f"{path}.replaced" + (f"-{others}" if others else ""))


def _write_model_files(place: Path, config: Config, source: ModelSource, noise_token: int, *, anew):
  """What exports and the sampler need; `anew` because they tell of the noise and the template."""
  if place.exists() and not anew:
    return
  with files.write_errors(place), files.unfinished(place) as temporary:
    model_files.save_model_files(
      source.directory,
      source.tokenizer,
      temporary,
      chat_template=config.data.chat_template,
      refinement=noise.from_config(config.noise).refinement(noise_token),
    )
    if place.exists():
      shutil.rmtree(place)
    temporary.rename(place)
