"""The declared keys as text: for --help, and for docs/config.md."""

import textwrap
from collections.abc import Iterator

from refine_jax.config import recipes
from refine_jax.config.key import Key, keys_of, sections_of
from refine_jax.config.schema import Config
from refine_jax.quoting import shown

_WIDTH = 100
_USAGE = """\
Trains a model.

  refine-jax train --config=FILE[:RECIPE] --workdir=DIR [--config.KEY=VALUE ...]
"""
_HEAD = """\
# Every key of a run

Made by `python -m refine_jax.config > docs/config.md` from refine_jax/config/schema.py; a test
keeps it current. On the command line a key is `--config.KEY=VALUE`; whole numbers are at most
2^31 - 1 where nothing else is said.
"""


def help_text() -> str:
  """What --help prints: the flags, the recipes, and each key with type, default and meaning."""
  lines = [_USAGE]
  flags = {
    "--config=FILE[:RECIPE]": "A Python file with get_config, such as those of configs/; or the"
    " name of one that comes with refine_jax, or of a recipe.",
    "--workdir=DIR": "Where the run lives: checkpoints, logs, metrics.",
    "--dry_run": "Say what would be done, with an example; train and write nothing.",
    "--[no]distributed": "Join the other processes of this run (docs/scale.md).",
    "--coordinator_address=..": "HOST:PORT, where process 0 listens; implies --distributed.",
    "--num_processes=N": "How many processes the run has; implies --distributed.",
    "--process_id=I": "Which of them this one is, from 0; implies --distributed.",
    "--flagfile=FILE": "More flags, one per line.",
    "--help": "Print this.",
  }
  lines += [f"  {flag:24}{meaning}" for flag, meaning in flags.items()]
  lines += ["", "Recipes: what a run trains for.", ""]
  lines += [f"  {name:24}{meaning}" for name, meaning in recipes.MEANINGS.items()]
  lines += [
    "",
    "Keys: --config.KEY=VALUE, over what the file says. Defaults are configs/base.py's.",
  ]
  for section, meaning, keys in _groups():
    lines += ["", f"{section}: {meaning}" if section else meaning]
    for key in keys:
      values = f"  [{key.values()}]" if key.values() else ""
      lines += _wrapped(f"{key.name}  {_type(key)} = {shown(key.default)}{values}", "  ", "      ")
      lines += _wrapped(key.meaning, "      ", "      ")
  return "\n".join(lines) + "\n"


def markdown() -> str:
  """docs/config.md: a table per section."""
  lines = [_HEAD, "## Recipes", "", "| recipe | what it trains for |", "| --- | --- |"]
  lines += [f"| `{name}` | {meaning} |" for name, meaning in recipes.MEANINGS.items()]
  for section, meaning, keys in _groups():
    lines += ["", f"## {section or 'seed'}", "", meaning, ""]
    lines += ["| key | type | default | values | meaning |", "| --- | --- | --- | --- | --- |"]
    for key in keys:
      cells = (f"`{key.name}`", _type(key), f"`{shown(key.default)}`", key.values(), key.meaning)
      lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  return "\n".join(lines) + "\n"


def _groups() -> Iterator[tuple[str, str, list[Key]]]:
  """Section ("" for keys outside of any), its meaning, its keys under their whole names."""
  yield "", "Randomness.", list(keys_of(Config).values())
  for section, kind in sections_of(Config).items():
    keys = [key.within(section) for key in keys_of(kind).values()]
    yield section, (kind.__doc__ or "").splitlines()[0], keys


def _type(key: Key) -> str:
  return f"tuple of {key.kind.__name__}" if key.sequence else key.kind.__name__


def _wrapped(text: str, first: str, rest: str) -> list[str]:
  return textwrap.wrap(
    text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
  )
