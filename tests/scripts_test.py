"""scripts/setup_env.sh: which interpreter it takes, and where it puts the environment."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_env(tmp_path):
  """setup_env with interpreters that only say who they are, in an empty project."""
  for name, version in (("python3", "3.11.9"), ("python3.12", "3.12.1"), ("python3.9", "3.9.2")):
    fake = tmp_path / "bin" / name
    fake.parent.mkdir(exist_ok=True)
    old = int(version.split(".")[1]) < 11
    fake.write_text(
      "#!/bin/sh\n"
      f"case $1 in -V) echo Python {version};; -c) exit {int(old)};;\n"
      f"-m) if [ $2 = venv ]; then mkdir -p $3/bin; cp {fake} $3/bin/python; "
      "echo PATH=$PATH > $3/bin/activate; fi;; esac\n"
    )
    fake.chmod(0o755)
  for file in ("setup.cfg", "pyproject.toml"):
    (tmp_path / file).write_text("")

  def run(**variables):
    command = f". {ROOT}/scripts/setup_env.sh; setup_env test; echo made"
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    environment = {"PATH": path, **variables}
    done = subprocess.run(
      ["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    places = sorted(p.name for p in tmp_path.iterdir() if (p / "bin" / "python").exists())
    return done, places

  return run


def test_each_python_has_an_environment_of_its_own(setup_env):
  assert setup_env()[1] == [".venv"]
  done, places = setup_env(PYTHON="python3.12")
  assert done.stdout == "made\n" and places == [".venv", ".venv-3.12"]
  assert setup_env(PYTHON="python3.12", REFINE_JAX_VENV="mine")[1] == [
    ".venv",
    ".venv-3.12",
    "mine",
  ]


def test_an_environment_of_another_python_is_refused(setup_env):
  setup_env()
  done, _ = setup_env(PYTHON="python3.12", REFINE_JAX_VENV=".venv")
  assert done.returncode == 1 and "3.11.9" in done.stderr and "3.12.1" in done.stderr


@pytest.mark.parametrize(
  "python, said", [("python3.9", "3.11 or later"), ("python4", "there is no")]
)
def test_an_old_or_absent_python_is_one_line(setup_env, python, said):
  done, places = setup_env(PYTHON=python)
  assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
  assert places == []
