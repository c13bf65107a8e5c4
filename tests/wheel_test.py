"""The wheel: all of the package and the configs in it; from it, every command starts."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from refine_jax.commands import COMMANDS
from refine_jax.config import bundled

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """What goes into a wheel, in a directory."""
  place = tmp_path_factory.mktemp("built")
  command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(place)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return place


def test_the_wheel_holds_the_whole_package_and_the_configs(built):
  skipped = {".pyc", ".orig"}
  want = {
    p.relative_to(ROOT)
    for p in (ROOT / "refine_jax").rglob("*")
    if p.is_file() and p.suffix not in skipped
  }
  configs = {p.name for p in (ROOT / "configs").glob("*.py")}
  want |= {Path("refine_jax", "bundled", "configs", name) for name in configs}
  assert {p.relative_to(built) for p in built.rglob("*") if p.is_file()} == want


def test_a_config_of_the_built_package_is_read_where_no_checkout_is(built, tmp_path):
  """Also by a file of the user's that starts from it."""
  own = tmp_path / "configs" / "mine.py"
  own.parent.mkdir()
  own.write_text(
    "from configs import base\n"
    "def get_config():\n  c = base.get_config('blocks')\n  c.seed = 7\n  return c\n"
  )
  code = (
    f"import sys; sys.path.insert(0, {str(built)!r})\n"
    "from refine_jax.config.command_line import load_config\n"
    "names = ('tiny:gated', 'configs/sums.py', 'gated', 'configs/mine.py')\n"
    "for c in map(load_config, names):\n"
    "  print(c.adapter.kind, c.data.train_files, c.noise.kind, c.seed)\n"
  )
  # Neither the checkout nor an editable install of it: site-packages alone, and no .pth of it.
  paths = {"PYTHONPATH": sysconfig.get_path("purelib")}
  done = subprocess.run(
    [sys.executable, "-S", "-c", code],
    cwd=tmp_path,
    env=os.environ | paths,
    capture_output=True,
    text=True,
  )
  assert done.stdout.splitlines() == [
    "gated data/tiny/train.parquet block 0",
    "none data/sums/train.parquet uniform 0",
    "gated  block 0",
    "none  block 7",
  ], done.stderr


def test_every_config_has_a_name_and_a_recipe_is_one():
  assert set(bundled.names()) == {p.stem for p in (ROOT / "configs").glob("*.py")} - {"recipes"}
  assert bundled.find("configs/tiny.py") == bundled.find("tiny") == (ROOT / "configs/tiny.py", "")
  assert bundled.find("blocks") == (ROOT / "configs/base.py", "blocks")
  for wrong in ("tiny.py", "recipes", "configs/gated.py", "../configs/tiny.py", "x/tiny", ""):
    assert bundled.find(wrong) is None


@pytest.mark.slow
def test_a_fresh_environment_with_the_wheel_alone_runs_every_command(tmp_path):
  """The wheel is installed; what it requires is taken from this environment."""
  source = tmp_path / "source"  # a copy, because building leaves its files there
  source.mkdir()
  for name in ("refine_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
  subprocess.run([*wheel, "-w", tmp_path, source], check=True, cwd=tmp_path)
  environment = tmp_path / "environment"
  subprocess.run([sys.executable, "-m", "venv", environment], check=True)
  python = environment / "bin" / "python"
  (found,) = tmp_path.glob("*.whl")
  subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", found], check=True)
  version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
  site = environment / "lib" / version / "site-packages"
  (site / "others.pth").write_text(sysconfig.get_path("purelib"))
  place = tmp_path / "empty"
  place.mkdir()
  variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

  def run(*arguments):
    command = [str(environment / "bin" / "refine-jax"), *arguments]
    return subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)

  for name in COMMANDS:
    done = run(name, "--help")
    assert done.returncode == 0 and name in done.stdout, (name, done.stderr)
  said = run("doctor")
  assert said.returncode == 0 and str(site) in said.stdout and "pip install -e" not in said.stdout
  # As far as a config, a recipe and the keys.
  done = run("train", "--config=tiny:gated", "--workdir=w")
  assert "models/tiny" in done.stderr and done.stderr.count("\n") == 1
  assert list(place.iterdir()) == []
