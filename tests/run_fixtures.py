"""Runs of the quickstart's model for the tests: as processes of their own, or in this one."""

import contextlib
import functools
import io
import json
import os
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import pytest
from absl import flags

from refine_jax import main as main_lib
from refine_jax.checkpoint import checkpointer

ROOT = Path(__file__).parents[1]
SETTINGS = [
  "--config.data.max_length=48",
  "--config.optim.batch_size=4",
  "--config.optim.total_steps=6",
  "--config.eval.eval_every=4",
  "--config.checkpoint.save_every=2",
  "--config.log.every=1",
  "--config.log.debug_every=3",
]


class Ended(NamedTuple):
  """How a program ended, named as in subprocess.CompletedProcess."""

  returncode: int
  stdout: str
  stderr: str


def make_data(directory):
  """The quickstart's data, cut down, in data/tiny."""
  script(directory, "scripts/make_tiny_data.py", "data/tiny")
  data = directory / "data" / "tiny"
  table = pyarrow.parquet.read_table(data / "train.parquet")
  pyarrow.parquet.write_table(table[:200], data / "train.parquet", row_group_size=50)


def environment(directory):
  return os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "REFINE_JAX_CACHE": str(directory / "cache"),
  }


def arguments(workdir, *extra) -> list[str]:
  return [f"--config={ROOT}/configs/tiny.py", f"--workdir={workdir}", *SETTINGS, *extra]


def command(workdir, *extra) -> list[str]:
  return [sys.executable, "-m", "refine_jax.main", *arguments(workdir, *extra)]


def train_process(place, workdir, *extra, check=True):
  """A run in a process of its own, on one device."""
  result = subprocess.run(
    command(workdir, *extra), cwd=place, env=environment(place), capture_output=True, text=True
  )
  assert not check or result.returncode == 0, result.stderr
  return result


def train(place, workdir, *extra, check=True) -> Ended:
  """A run in this process, which costs no imports and shares compiled programs; on one device."""
  flag_values = flags.FlagValues()
  workdir_flag = flags.DEFINE_string("workdir", None, "", flag_values=flag_values)
  others = {
    "_DRY_RUN": flags.DEFINE_bool("dry_run", False, "", flag_values=flag_values),
    "_DISTRIBUTED": flags.DEFINE_bool("distributed", False, "", flag_values=flag_values),
    "_ADDRESS": flags.DEFINE_string("coordinator_address", None, "", flag_values=flag_values),
    "_COUNT": flags.DEFINE_integer("num_processes", None, "", flag_values=flag_values),
    "_INDEX": flags.DEFINE_integer("process_id", None, "", flag_values=flag_values),
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(main_lib, "flags", types.SimpleNamespace(FLAGS=flag_values))
    patch.setattr(main_lib, "_WORKDIR", workdir_flag)
    for name, flag in others.items():
      patch.setattr(main_lib, name, flag)
    one = () if any("mesh.data" in a for a in extra) else ("--config.mesh.data=1",)
    return _call(place, main_lib.run, ["main", *arguments(workdir, *one, *extra)], check)


def script(directory, name, *arguments, check=True) -> Ended:
  """A program of scripts/ in this process."""
  path = str(ROOT / name)
  program = functools.partial(runpy.run_path, path, run_name="__main__")
  return _call(directory, program, [path, *arguments], check)


def _call(directory, program: Callable, argv, check) -> Ended:
  out, err = io.StringIO(), io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", list(map(str, argv)))
    patch.setenv("REFINE_JAX_CACHE", str(directory / "cache"))
    patch.chdir(directory)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      with pytest.raises(SystemExit) as end:
        program()
  ended = Ended(end.value.code or 0, out.getvalue(), err.getvalue())
  assert not check or ended.returncode == 0, ended.stderr
  return ended


def parameters(workdir, step=6):
  return checkpointer.restore_params(workdir, step)[0]


def assert_equal_trees(a, b):
  assert a.keys() == b.keys()
  for name in a:
    if isinstance(a[name], dict):
      assert_equal_trees(a[name], b[name])
    else:
      np.testing.assert_array_equal(a[name], b[name])


def records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
