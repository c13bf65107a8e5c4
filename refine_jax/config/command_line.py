"""--config=FILE[:RECIPE] --config.KEY=VALUE ..., with all that can be wrong in them as one line."""

import importlib.machinery
import inspect
import re
import sys
import traceback
import types
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from refine_jax import files
from refine_jax.config import bundled
from refine_jax.config.build import check_names
from refine_jax.config.key import all_keys, nearest
from refine_jax.config.schema import Config
from refine_jax.errors import UserError
from refine_jax.quoting import shown

_KEY_FLAG = re.compile(r"--?(?:no)?config\.([^=]*)")


def parse(argv: Sequence[str], flag_values: flags.FlagValues) -> tuple[ConfigDict, list[str]]:
  """Reads the flags and the config that --config names, with what --config.KEY=VALUE sets in it.

  Args:
    argv: the program's name and its arguments.
    flag_values: has the program's other flags, and gets those of the keys that are set.

  Returns:
    the config, locked but not checked beyond its keys; and what is no flag, the program's name
    first.

  Raises:
    UserError: a flag, key or value that is not right; a config file that is not there or fails.
  """
  try:
    argv = flag_values.read_flags_from_files(list(argv), force_gnu=False)
  except (flags.Error, OSError, ValueError) as error:
    raise UserError(f"--flagfile: {_first_line(error)}") from error
  file, argv = _take_config(argv)
  _check_keys(argv)
  if file is None:
    # Without one, too, a mistyped option is said first.
    _call(flag_values, argv)
    raise UserError("--config is missing; name a file such as configs/tiny.py, or a recipe.")
  config = load_config(file)
  try:
    config_flags.DEFINE_config_dict(
      "config", config, "A file of configs/.", flag_values, sys_argv=argv
    )
  except Exception as error:
    raise UserError(_first_line(error)) from error
  return config, _call(flag_values, argv)


def load_config(name: str) -> ConfigDict:
  """Runs get_config of a Python file.

  Args:
    name: FILE or FILE:RECIPE; the recipe is get_config's argument. Where there is no such file:
      NAME or NAME:RECIPE, of a config that comes with the package, or RECIPE alone, of base.py.

  Raises:
    UserError: no such file, it fails, or it returns no config with the schema's keys.
  """
  file, given, recipe = name.partition(":")
  path = files.local_path(file, "--config")
  if not path.is_file():
    found = bundled.find(file)
    if found is None:
      raise UserError(
        f"--config names {shown(file)}, and there is no such file; configs that come with"
        f" refine_jax: {', '.join(bundled.names())}."
      )
    path = found[0]
    if found[1]:
      if given:
        raise UserError(
          f"--config={name}: {file!r} is a recipe already; leave out {':' + recipe!r}."
        )
      given, recipe = ":", found[1]
  bundled.make_importable(path)
  loader = importlib.machinery.SourceFileLoader("refine_jax_user_config", str(path))
  module = types.ModuleType(loader.name)
  module.__file__ = str(path)
  sys.modules[loader.name] = module  # where dataclasses look up the names in annotations
  _run(path, loader.exec_module, module)
  get_config = getattr(module, "get_config", None)
  if not callable(get_config):
    raise UserError(f"{path} has no function get_config; configs/tiny.py is an example.")
  arguments = [recipe] if given else []
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    raise UserError(
      f"{path}: get_config takes no recipe; leave out {':' + recipe!r}."
      if given
      else f"{path}: get_config needs a recipe: --config={path}:RECIPE."
    ) from None
  config = _run(path, get_config, *arguments)
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"{path}: get_config returned {type(config).__name__}; it must return the ConfigDict of"
      " configs/base.py, changed as you like."
    )
  try:
    check_names(config)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  return config


def _run(path, function, *arguments):
  """What the user's file does, whose errors are told by their line in it."""
  try:
    return function(*arguments)
  except UserError:
    raise
  # A config that calls exit() is no end of the program that reads it.
  except (Exception, SystemExit) as error:
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
      if frame.filename == str(path):
        line = frame.lineno
    place = f"{path}, line {line}" if line else f"{path}"
    reason = error.msg if isinstance(error, SyntaxError) else _first_line(error)
    raise UserError(f"{place}: {type(error).__name__}: {reason}") from error


def _take_config(argv) -> tuple[str | None, list[str]]:
  """The last value of --config, and the other arguments."""
  file, rest, arguments = None, [], iter(argv)
  for argument in arguments:
    name, given, value = argument.partition("=")
    if name not in ("--config", "-config"):
      rest.append(argument)
      if argument == "--":
        return file, [*rest, *arguments]
    else:
      file = value if given else next(arguments, None)
      if file is None:
        raise UserError("--config has no value; name a file such as configs/tiny.py.")
  return file, rest


def _check_keys(argv):
  """Raises UserError at the first --config.KEY that is not declared, with the nearest that is."""
  names = [key.name for key in all_keys(Config)]
  sections = {name.partition(".")[0] for name in names if "." in name}
  for argument in argv:
    match = _KEY_FLAG.match(argument)
    if not match or match[1] in names or match[1] in sections:
      continue
    section, _, rest = match[1].partition(".")
    value = next((n for n in names if match[1].startswith((f"{n}.", f"{n}["))), None)
    if value:
      raise UserError(f"{shown(argument)[1:-1]}: {value} is one value; set it as a whole.")
    if rest and section not in sections and nearest(section, sections):
      wrong, near = section, nearest(section, sections).replace("Did", "did")
    else:
      wrong, near = match[1], _nearest_key(match[1], names)
    raise UserError(f"{shown(argument)[1:-1]}: there is no key {shown(wrong)};{near}")


def _nearest_key(name, names):
  """What is most like it: in its section, by its last part anywhere, or by its whole name."""
  section, _, last = name.rpartition(".")
  inside = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == section}
  anywhere = {n.rpartition(".")[2]: n for n in reversed(names)}
  for known, wanted in ((inside, last), (anywhere, last), ({n: n for n in names}, name)):
    found = re.search(r"'(.+)'", nearest(wanted, known))
    if found:
      return f" did you mean {known[found[1]]!r}?"
  return " python -m refine_jax.main --help lists them all."


def _call(flag_values, argv):
  try:
    return flag_values(argv)
  # absl's parsers, and Python's own where they read a tuple, raise a dozen kinds of error.
  except Exception as error:
    raise UserError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
  text = str(error).strip()
  return (text.splitlines()[0] if text else type(error).__name__)[:500]
