"""Who a process is, how it notices that another ended, and the scripts that start them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine_jax import distributed
from refine_jax.distributed import Place, find_place
from refine_jax.errors import UserError

ROOT = Path(__file__).parents[1]
TORCHRUN = {"MASTER_ADDR": "h", "MASTER_PORT": "7", "WORLD_SIZE": "8", "RANK": "5"}
JAX = {"JAX_COORDINATOR_ADDRESS": "j:5", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
  "flags, environment, place",
  [
    (("a:1", 2, 1), JAX, Place("a:1", 2, 1)),
    ((None,) * 3, JAX | TORCHRUN, Place("j:5", 3, 2)),
    ((None,) * 3, TORCHRUN, Place("h:7", 8, 5)),
    ((None,) * 3, TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, Place("h:8", 8, 5)),
    (
      (None,) * 3,
      TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"},
      Place("h:7", 8, 5, (1,)),
    ),
    ((None,) * 3, TORCHRUN | {"SLURM_JOB_ID": "1"}, Place()),
    ((None,) * 3, {"JAX_COORDINATOR_ADDRESS": "j:5"}, Place()),
    ((None,) * 3, {}, Place()),
  ],
)
def test_flags_come_before_jaxs_variables_and_those_before_torchruns(flags, environment, place):
  assert find_place(*flags, environment) == place


@pytest.mark.parametrize(
  "flags, environment, message",
  [
    (
      ("a:1", None, 0),
      {},
      "--num_processes is missing next to --coordinator_address, --process_id",
    ),
    ((None,) * 3, {"RANK": "0"}, "MASTER_ADDR, WORLD_SIZE is missing next to RANK; give --coord"),
    (("a", 2, 0), {}, "--coordinator_address=a, --num_processes=2, --process_id=0: this is no"),
    (("a:1", 2, 2), {}, "no process of so many"),
    (("a:x", 2, 1), {}, "no address with a port"),
    ((None,) * 3, JAX | {"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID=two"),
  ],
)
def test_what_is_missing_or_wrong_is_named(flags, environment, message):
  with pytest.raises(UserError, match=message):
    find_place(*flags, environment)


def test_a_process_that_cannot_find_out_who_it_is_says_so_in_one_line(tmp_path):
  command = [sys.executable, "-m", "refine_jax.main", "--config=configs/tiny.py", "--distributed"]
  drop = {"JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"}
  environment = {k: v for k, v in os.environ.items() if k not in drop}
  done = subprocess.run(
    [*command, f"--workdir={tmp_path}/run"],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and done.stderr.startswith(
    "error: Who the processes are is not known"
  )
  assert "--coordinator_address=HOST:PORT" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_others_do_not_come_ends_with_one_line(index):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  code = (
    "from refine_jax import distributed as d; d._JOIN = 2\n"
    f"with d.joined(d.Place('{address}', 2, {index})): pass"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
  assert done.returncode == 1 and done.stderr.count("error: ") == 1
  assert "Not all processes of this run have met (they did not within 2 seconds)" in done.stderr


class Store(dict):
  """The coordinator's store."""

  def key_value_set(self, key, value, allow_overwrite):
    assert allow_overwrite
    self[key] = value

  def key_value_dir_get(self, prefix):
    return [(k, v) for k, v in list(self.items()) if k.startswith(prefix + "/")]


def watched(monkeypatch, store) -> str:
  """What process 0 of 2 leaves with."""
  monkeypatch.setattr(distributed, "_BEAT", 0.01)
  monkeypatch.setattr(distributed, "_SILENCE", 0.2)
  said = []

  class Recording(distributed.Watch):
    def leave(self, text, **options):
      self._over.set()
      said.append(text)

  Recording(store, 0, 2)
  end = time.monotonic() + 20
  while not said and time.monotonic() < end:
    time.sleep(0.01)
  return said[0]


def test_a_process_leaves_with_the_error_of_another(monkeypatch):
  store = Store({"refine_jax/ended/1": "No space left."})
  assert watched(monkeypatch, store) == "process 1 of 2 has ended: No space left."


def test_a_process_leaves_when_another_is_silent_but_not_when_it_is_done(monkeypatch):
  store = Store({"refine_jax/alive/1": "4"})
  assert watched(monkeypatch, store).startswith("process 1 of 2 has not been heard of for 0.2 s")
  done = Store({"refine_jax/alive/1": "4", "refine_jax/ended/1": ""})
  watch = distributed.Watch(done, 0, 2)
  time.sleep(0.5)
  watch.done()
  # Still beating, where the test above had ended.
  assert int(done["refine_jax/alive/0"]) > 20


def stubs(directory, **scripts) -> dict:
  """An environment whose PATH begins with these programs."""
  for name, text in scripts.items():
    (directory / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (directory / name).chmod(0o755)
  return {"PATH": f"{directory}:{os.environ['PATH']}"}


def launch(name, environment, *arguments):
  return subprocess.run(
    ["bash", str(ROOT / "scripts" / "launch" / name), *arguments],
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_bare_hosts_number_their_processes_and_end_with_the_first_error(tmp_path):
  says = 'echo "$JAX_LOCAL_DEVICE_IDS $*"; [ "${JAX_LOCAL_DEVICE_IDS:-0}" = 0 ] || exit 7'
  variables = stubs(tmp_path, python=says) | {"ADDRESS": "h:1", "HOSTS": "2", "HOST": "1"}
  done = launch("hosts.sh", variables, "--workdir=a b")
  common = "-m refine_jax.main --coordinator_address=h:1 --num_processes"
  assert (done.returncode, done.stdout) == (0, f" {common}=2 --process_id=1 --workdir=a b\n")
  done = launch("hosts.sh", variables | {"PROCESSES": "2"}, "--workdir=w")
  assert done.returncode == 7 and sorted(done.stdout.splitlines()) == [
    f"{i} {common}=4 --process_id={2 + i} --workdir=w" for i in range(2)
  ]
  del variables["ADDRESS"]
  assert "ADDRESS: is HOST:PORT" in launch("hosts.sh", variables).stderr


def test_a_signal_to_the_launcher_of_bare_hosts_reaches_all_processes(tmp_path):
  waits = "trap 'echo saved; exit 143' TERM; echo up; while :; do sleep 0.1; done"
  variables = stubs(tmp_path, python=waits) | {"ADDRESS": "h:1", "HOSTS": "1", "HOST": "0"}
  script = str(ROOT / "scripts" / "launch" / "hosts.sh")
  process = subprocess.Popen(
    ["bash", script], env=variables | {"PROCESSES": "2"}, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
  process.terminate()
  out, _ = process.communicate(timeout=60)
  assert (process.returncode, out) == (143, "saved\n" * 2)


def test_slurm_and_a_tpu_slice_start_the_run_everywhere(tmp_path):
  variables = stubs(tmp_path, srun='printf "%s|" "$@"', gcloud='printf "%s|" "$@"')
  out = launch("slurm.sh", variables, "--config=c.py", "--workdir=a b").stdout
  wanted = (
    "--kill-on-bad-exit=1|python|-m|refine_jax.main|--distributed|--config=c.py|--workdir=a b|"
  )
  assert out == wanted
  variables |= {"TPU": "slice", "ZONE": "z1"}
  out = launch("tpu_pod.sh", variables, "--config=c.py", "--workdir=a b").stdout
  assert out.startswith(
    "compute|tpus|tpu-vm|ssh|slice|--zone=z1|--worker=all|--command=cd refine_jax"
  )
  assert out.endswith("-m refine_jax.main --distributed --config=c.py --workdir=a\\ b|")
