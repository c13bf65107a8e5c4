"""What is left on disk by a process that is killed, or whose disk is full, while it saves."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import grain
import jax
import jax.numpy as jnp

from refine_jax.checkpoint import checkpointer
from refine_jax.checkpoint.checkpointer import Checkpointer

# Saves a small step 1 and then starts to save a large step 2, whose writing is watched or hindered.
_SAVES = """
  import os, resource, signal, sys, time
  import grain, jax.numpy as jnp, numpy as np
  from refine_jax.checkpoint.checkpointer import Checkpointer
  from refine_jax.errors import UserError
  checkpointer = Checkpointer(sys.argv[1], max_to_keep=1)
  data = iter(grain.MapDataset.source(list(range(9))).to_iter_dataset())
  checkpointer.save(1, {"x": jnp.zeros(100)}, data, {}, {})
  checkpointer.wait()
  noise = np.random.default_rng(0).random(4_000_000, dtype=np.float32)
"""
_KILLED = """
  checkpointer.save(2, {"x": jnp.asarray(noise)}, data, {}, {})
  while not any("tmp" in name for name in os.listdir(checkpointer.directory)):
    time.sleep(0.001)
  os.kill(os.getpid(), signal.SIGKILL)
"""
_HINDERED = """
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
  checkpointer.save(2, {"x": jnp.asarray(noise)}, data, {}, {})
  for _ in range(600):
    try:
      checkpointer.check()
    except UserError as error:
      print(error)
      break
    time.sleep(0.1)
  checkpointer.close()
"""


def _run(workdir, code):
  code = textwrap.dedent(_SAVES) + textwrap.dedent(code)
  command = [sys.executable, "-c", code, str(workdir)]
  root = Path(__file__).parents[1]
  return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_killed_while_saving_leaves_the_one_before(tmp_path):
  assert _run(tmp_path, _KILLED).returncode == -signal.SIGKILL
  directory = tmp_path / "checkpoints"
  assert any("tmp" in p.name for p in directory.iterdir())
  assert checkpointer.steps(directory) == [1]
  writer, state = Checkpointer(tmp_path, max_to_keep=1), {"x": jnp.ones(100)}
  iterator = iter(grain.MapDataset.source(list(range(9))).to_iter_dataset())
  abstract = jax.ShapeDtypeStruct((100,), jnp.float32, sharding=state["x"].sharding)
  got, step = writer.restore(None, {"x": abstract}, iterator, {})
  assert step == 1 and not got["x"].any()
  writer.save(3, state, iterator, {}, {})
  writer.close()
  assert {p.name for p in directory.iterdir()} == {"3"}  # the killed one's remains are gone


def test_a_save_that_fails_in_the_background_is_one_clear_error(tmp_path):
  result = _run(tmp_path, _HINDERED)
  assert result.returncode == 0, result.stderr
  for words in ("could not be written", "File too large", "GiB are free"):
    assert words in result.stdout
  assert checkpointer.steps(tmp_path / "checkpoints") == [1]
