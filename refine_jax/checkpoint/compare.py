"""Whether a checkpoint belongs to the model, the optimizer and the run that want it."""

from pathlib import Path

from refine_jax.errors import UserError


def refuse_others(
  path: Path, record: dict, identity: dict, leaves: set[str], run: dict, allow: tuple[str, ...]
) -> None:
  """Compares a checkpoint's record with what is here.

  Args:
    record: what Checkpointer.save wrote next to the state.
    identity: the model's, all of it must be equal.
    leaves: names of the state's arrays.
    run: name -> value, must be equal but for the names in `allow`.

  Raises:
    UserError: names what differs, and how to go on.
  """
  if record["identity"] != identity:
    raise UserError(
      f"{path} is of another model ({_differences(record['identity'], identity)});"
      " choose another --workdir or the model that it was made from."
    )
  different = sorted(leaves ^ record["checksums"].keys())
  if different:
    raise UserError(
      f"{path} was written with another optimizer: {different[0]} is only in one of the two;"
      " set config.optim (clip_grad, weight_decay) as in its run, or choose another --workdir."
    )
  found, wanted = (
    {k: v for k, v in x.items() if k not in allow} for x in (record.get("run", {}), run)
  )
  if found and wanted and found != wanted:
    allowed = ",".join(f"'{name}'" for name in (*allow, *_different(found, wanted)))
    raise UserError(
      f"{path} is of a run with other values ({_differences(found, wanted)}); choose another"
      " --workdir, give them as they were, or go on with these:"
      f' --config.checkpoint.allow_changes="({allowed},)".'
    )


def _different(found: dict, wanted: dict) -> list[str]:
  return [n for n in sorted(found.keys() | wanted.keys()) if found.get(n) != wanted.get(n)]


def _differences(found: dict, wanted: dict, most: int = 3) -> str:
  names = _different(found, wanted)
  parts = [f"{n} {found.get(n)} there, {wanted.get(n)} here" for n in names[:most]]
  return "; ".join(parts + [f"and {len(names) - most} more"] * (len(names) > most))
