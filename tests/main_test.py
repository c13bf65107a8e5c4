"""What the command line says of keys and files that are wrong: one line, with what is near."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refine_jax import main
from refine_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BROKEN = {
  "syntax": ("def get_config(:\n", "line 1: SyntaxError"),
  "import": ("import nosuchmodule\n", "No module named 'nosuchmodule'"),
  "fails": ("def get_config():\n  return 1 / 0\n", "line 2: ZeroDivisionError"),
  "other": ("x = 1\n", "has no get_config()"),
  "nothing": ("def get_config():\n  pass\n", "get_config() returned nothing"),
}
# Parses each command line in a process of its own, because flags can be defined only once.
_PARSES = """
import os, sys
from refine_jax import main
for name in sys.argv[1:]:
  if not os.fork():
    sys.argv = ["main", f"--config={name}"]
    try:
      main._parse_flags(sys.argv)
    except main.UserError as error:
      print(error, flush=True)
    os._exit(0)
  os.wait()
"""


@pytest.mark.parametrize(
  "argument, said",
  [
    ("--config.foo=3", "--config.foo=3: there is no key 'foo' in config; it has seed"),
    ("--config.optm.lr=1", "did you mean 'optim'?"),
    ("--config.optim.lrr=1", "no key 'lrr' in config.optim; did you mean 'lr'?"),
    ("--config.optim.lr.x=1", "config.optim.lr is a value"),
  ],
)
def test_a_key_that_is_not_there_is_named_with_the_nearest(argument, said):
  with pytest.raises(UserError) as error:
    main._check_key(argument)
  assert said in str(error.value)


@pytest.mark.parametrize("argument", ["--config.seed=1", "--config.optim.betas[0]=0.5"])
def test_a_key_that_is_there_passes(argument):
  main._check_key(argument)


def test_a_broken_config_file_is_one_line_that_names_it(tmp_path):
  for name, (text, _) in BROKEN.items():
    (tmp_path / f"{name}.py").write_text(text)
  paths = [str(tmp_path / f"{name}.py") for name in BROKEN]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", _PARSES, *paths], env=environment, capture_output=True, text=True
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(BROKEN), done.stderr
  for line, path, (_, said) in zip(lines, paths, BROKEN.values(), strict=True):
    assert path in line and said in line
