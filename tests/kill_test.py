"""A run killed twenty times at random moments ends with the bits of one that nothing disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refine_jax.checkpoint import checkpointer

ROOT = Path(__file__).parents[1]
KILLS = 20


def command(workdir):
  """A run that saves, exports, validates and logs all the time, so that kills fall into each."""
  return [
    sys.executable,
    "-m",
    "refine_jax.main",
    f"--config={ROOT}/configs/tiny.py",
    f"--workdir={workdir}",
    "--config.data.max_length=48",
    "--config.optim.batch_size=4",
    "--config.optim.total_steps=60",
    "--config.eval.eval_every=3",
    "--config.checkpoint.save_every=2",
    "--config.checkpoint.save_hf=True",
    "--config.log.every=1",
    "--config.log.debug_every=5",
  ]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "REFINE_JAX_CACHE": str(tmp_path / "cache"),
  }
  options = {"cwd": tmp_path, "env": environment}
  script = [sys.executable, str(ROOT / "scripts" / "make_tiny_data.py"), "data/tiny"]
  subprocess.run(script, check=True, **options)
  start = time.monotonic()
  subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL, **options)
  again = time.monotonic()
  subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL, **options)
  # From the moment that nothing but imports and data lies behind it to where a run ends.
  startup, whole = time.monotonic() - again, again - start
  generator, killed, starts = random.Random(0), 0, 0
  while killed < KILLS:
    starts += 1
    assert starts < 4 * KILLS, "the run ends before it can be killed so often"
    log = open(tmp_path / f"log-{starts}", "w+")  # noqa: SIM115  closed with the process
    process = subprocess.Popen(command("killed"), stdout=log, stderr=log, **options)
    try:
      # Mostly shortly after the start, so that there is something left to be killed.
      process.wait(startup * 0.5 + generator.random() * min(whole, startup + 4.0))
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.wait()
      killed += 1
    log.seek(0)
    said = log.read()
    log.close()
    assert process.returncode in (0, -signal.SIGKILL), said
    if process.returncode == 0 and killed < KILLS:
      # It is complete: what is killed from now on is the last steps, trained once more.
      newest = checkpointer.steps(tmp_path / "killed" / "checkpoints")[-1]
      (tmp_path / "killed" / "checkpoints" / str(newest)).rename(tmp_path / f"aside-{starts}")
  subprocess.run(command("killed"), check=True, stdout=subprocess.DEVNULL, **options)
  ours, theirs = (
    flat(checkpointer.restore_params(tmp_path / name)[0]) for name in ("killed", "whole")
  )
  assert ours.keys() == theirs.keys()
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
  exported = [
    {p.parent.parent.name: p.read_bytes() for p in (tmp_path / name).rglob("model.safetensors")}
    for name in ("killed", "whole")
  ]
  # The newest that was there at each start; older ones went with their checkpoints unseen.
  assert exported[0]["global_step_60"] == exported[1]["global_step_60"]
  assert not list((tmp_path / "killed").rglob("*.new"))


def flat(tree, prefix=""):
  result = {}
  for name, value in tree.items():
    inner = flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    result |= inner
  return result
