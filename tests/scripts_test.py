"""scripts/setup_env.sh: which interpreter it takes, and where it puts the environment; the command
lines of the scripts: what cannot be is refused at the start."""

import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from refine_jax.evaluation import evaluate
from scripts import experiment_tasks, make_tasks, relabel

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


# A program -> what it needs, and its whole numbers with the least that each may be.
COUNTS = {
  make_tasks.main: ([], {"train": 1, "val": 1, "test": 1}),
  experiment_tasks.main: (
    ["--runs=r", "--output=o"],
    {"max_new_tokens": 1, "batch_size": 1, "timed": 0, "block_size": 1},
  ),
  relabel.main: (
    ["--model=m", "--data=d", "--output=o"],
    {"max_new_tokens": 1, "batch_size": 1, "block_size": 1},
  ),
  evaluate.main: (["--model=m", "--data=d"], {"max_new_tokens": 1, "batch_size": 1, "limit": 0}),
}


def refusal(main, arguments, monkeypatch, capsys, place):
  """What a program says that refuses its command line, having written nothing."""
  monkeypatch.chdir(place)
  before = sorted(place.iterdir())
  monkeypatch.setattr(sys, "argv", ["program", *arguments])
  with pytest.raises(SystemExit) as end:
    main()
  said = capsys.readouterr()
  assert end.value.code == 1 and not said.out
  assert said.err.startswith("error: ") and said.err.count("\n") == 1
  assert sorted(place.iterdir()) == before
  return said.err


@pytest.mark.parametrize("value", ["least", "1.5", "many", "", "9" * 5000])
@pytest.mark.parametrize(
  "main, required, option, least",
  [(main, r, o, least) for main, (r, options) in COUNTS.items() for o, least in options.items()],
)
def test_a_number_that_counts_is_whole_and_not_too_small(
  main, required, option, least, value, monkeypatch, capsys, tmp_path
):
  value = str(least - 1) if value == "least" else value
  said = refusal(main, [*required, f"--{option}={value}"], monkeypatch, capsys, tmp_path)
  assert f"--{option}=" in said and f"a whole number of at least {least}" in said


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--recipes=ar_sft,blokcs", "recipe 'blokcs' is not known"),
    ("--recipes=", "recipe '' is not known"),
    ("--seeds=0,-1", "--seeds='-1'"),
    ("--seeds=0,,1", "--seeds=''"),
    ("--block_sizes=8,x", "--block_sizes='8,x'"),
    ("--block_sizes=8,0", "block_size=0 cannot be"),
    ("--block_sizes=8,8", "twice"),
    ("--dtype=int4", "--dtype=int4 is not known"),
    ("--scorer=best", "--scorer=best is not known"),
    ("--test=nowhere.parquet", "nowhere.parquet"),
    ("--test=other.parquet", "no column 'answer'"),
    ("--runs=gs://bucket/x", "gs:// is not supported"),
    ("--output=gs://bucket/x", "gs:// is not supported"),
  ],
)
def test_an_experiment_refuses_before_it_trains_what_its_evaluations_would(
  argument, words, monkeypatch, capsys, tmp_path
):
  def run(command, **_):
    raise AssertionError(f"it has begun: {command}")

  monkeypatch.setattr(experiment_tasks.subprocess, "run", run)
  for name, column in (("test", "answer"), ("other", "solution")):
    table = pyarrow.table({"prompt": ["a"], column: ["1"]})
    pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
  required = ["--runs=r", "--output=o", "--test=test.parquet"]
  assert words in refusal(
    experiment_tasks.main, [*required, argument], monkeypatch, capsys, tmp_path
  )
