"""A run killed twenty times at random moments ends with the bits of one that nothing disturbed."""

import json
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
  subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL, **options)
  generator, killed, starts = random.Random(0), 0, 0
  while killed < KILLS:
    starts += 1
    assert starts < 4 * KILLS, "the run ends before it can be killed so often"
    with open(tmp_path / f"log-{starts}", "w", encoding="utf-8") as log:
      process = subprocess.Popen(command("killed"), stdout=log, stderr=log, **options)
    # Most from where it goes on, which on a busy machine takes its time; some on the way there.
    early = generator.random() < 0.2
    wait_for_start(process, tmp_path / f"log-{starts}", 5 * generator.random() if early else 300)
    try:
      process.wait(0 if early else 4 * generator.random())
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.wait()
      killed += 1
    said = (tmp_path / f"log-{starts}").read_text()
    assert process.returncode in (0, -signal.SIGKILL), said
    if process.returncode == 0:
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
  for step in (3, 30, 60):
    ours, theirs = (evaluations(tmp_path / name, step) for name in ("killed", "whole"))
    # A step that was taken again was validated again, to the same numbers.
    assert theirs and ours and all(record == theirs[0] for record in ours)
  exported = [
    {p.parent.parent.name: p.read_bytes() for p in (tmp_path / name).rglob("model.safetensors")}
    for name in ("killed", "whole")
  ]
  # The newest that was there at each start; older ones went with their checkpoints unseen.
  assert exported[0]["global_step_60"] == exported[1]["global_step_60"]
  assert not list((tmp_path / "killed").rglob("*.new"))


def wait_for_start(process, log, patience):
  """Until it says where it goes on from, has ended, or so many seconds are over."""
  end = time.monotonic() + patience
  while time.monotonic() < end and process.poll() is None:
    if "\nstart " in log.read_text(errors="replace"):
      return
    time.sleep(0.02)


def evaluations(workdir, step):
  lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
  return [record for record in lines if record["step"] == step and "eval/loss_total" in record]


def flat(tree, prefix=""):
  result = {}
  for name, value in tree.items():
    inner = flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    result |= inner
  return result
