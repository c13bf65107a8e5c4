"""Joining the other processes of a run, and ending with them: no process waits for a dead one.

Every process tells the coordinator, a server in process 0, that it is alive, and with what error it
ends; a thread of each reads what the others say. Nothing of it takes part in a step.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from refine_jax.cli import one_line
from refine_jax.errors import UserError
from refine_jax.quoting import cut, reason

# Seconds. JAX gives up on its own some time after a process went silent, later than this does, for
# it does so with a long trace.
_JOIN, _SILENCE, _BEAT, _FAREWELL, _JAX_SILENCE = 100, 60, 2, 10, 150
_ALIVE, _ENDED = "refine_jax/alive", "refine_jax/ended"
_FOUND_BY_JAX = {"SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"}
_HOW = (
  "give --coordinator_address=HOST:PORT --num_processes=N --process_id=I to each process (or"
  " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; or MASTER_ADDR, MASTER_PORT,"
  " WORLD_SIZE, RANK), or start it by SLURM, Open MPI, Kubernetes or on a TPU slice"
)


class Place(NamedTuple):
  """Who this process is; None: JAX finds it out.

  Attributes:
    address: HOST:PORT, where process 0 listens.
    count: of processes.
    index: of this one, from 0.
    local_devices: which of this host's devices it takes; None: all.
  """

  address: str | None = None
  count: int | None = None
  index: int | None = None
  local_devices: tuple[int, ...] | None = None


def find_place(
  address: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> Place:
  """Who this process is, by its flags, then JAX_*, then torchrun's variables.

  Raises:
    UserError: some of it is missing, or no number.
  """
  flags = {"--coordinator_address": address, "--num_processes": count, "--process_id": index}
  jax_names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  found = [flags, {name: environment.get(name) for name in jax_names}]
  if not environment.keys() & _FOUND_BY_JAX:  # a batch script's MASTER_ADDR is for other programs
    found.append({name: environment.get(name) for name in ("MASTER_ADDR", "WORLD_SIZE", "RANK")})
  given = next((x for x in found if any(v is not None for v in x.values())), None)
  if given is None or (given is found[1] and given["JAX_PROCESS_ID"] is None):
    return Place()  # an address alone goes together with what JAX finds
  missing = [name for name, value in given.items() if value is None]
  if missing:
    there = [name for name in given if name not in missing]
    raise UserError(f"{', '.join(missing)} is missing next to {', '.join(there)}; {_HOW}.")
  (where, total, own), local = given.values(), None
  torchrun = "RANK" in given
  try:
    total, own, where = int(total), int(own), str(where)
    if torchrun:
      # At the port itself torchrun's agent listens.
      port = int(environment.get("MASTER_PORT", "29400")) + ("TORCHELASTIC_RUN_ID" in environment)
      where = f"{where}:{port}"
    several = torchrun and environment.get("LOCAL_WORLD_SIZE", "1") != "1"
    local = (int(environment.get("LOCAL_RANK", "")),) if several else None
    good = 0 <= own < total and ":" in where and 0 < int(where.rpartition(":")[2]) < 2**16
  except ValueError:
    good = False
  if not good:
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    raise UserError(f"{text}: this is no address with a port and no process of so many; {_HOW}.")
  return Place(where, total, own, local)


@contextlib.contextmanager
def joined(place: Place) -> Iterator[None]:
  """Joins the others, and ends with them: all get through the block, or none.

  What the other processes than the first print is dropped, what they say on stderr is not. An error
  in one of them ends the others, each with one line and exit status 1.

  Raises:
    UserError: not all processes have come in time, or it cannot be found out who this one is.
  """
  _initialize(place)
  if jax.process_count() == 1:
    yield
    return
  if jax.process_index() > 0:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  to the process's end
  from jax._src import distributed  # private: the coordinator's store has no public way to it

  watch = Watch(distributed.global_state.client, jax.process_index(), jax.process_count())
  try:
    yield
  except KeyboardInterrupt:
    watch.leave("interrupted", status=128 + signal.SIGINT)
  except Exception as error:
    text = one_line(error)
    if text is None and isinstance(error, jax.errors.JaxRuntimeError):
      watch.leave_after_others(reason(error))
    if text is None:
      sys.excepthook(type(error), error, error.__traceback__)
    watch.leave(text or reason(error), said=text is None)
  else:
    watch.done()


def _initialize(place: Place):
  # JAX itself would abort, with a trace.
  late = threading.Timer(_JOIN, _end_unjoined, [f"they did not within {_JOIN} seconds"])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      place.address,
      place.count,
      place.index,
      local_device_ids=place.local_devices,
      initialization_timeout=2 * _JOIN,
      heartbeat_timeout_seconds=_JAX_SILENCE,
    )
  except ValueError as error:
    raise UserError(f"Who the processes are is not known ({reason(error)}); {_HOW}.") from error
  except RuntimeError as error:  # JAX's own, such as for an address in use
    raise UserError(_unjoined(reason(error))) from error
  finally:
    late.cancel()


def _unjoined(why):
  return (
    f"Not all processes of this run have met ({why}); start all of them, with the same"
    " --coordinator_address and --num_processes, and look whether process 0 can be reached there."
  )


def _end_unjoined(why):
  _print_error(_unjoined(why))
  os._exit(1)


class Watch:
  """Tells that this process is alive, and ends it when another is not.

  Args:
    client: of the coordinator's store: key_value_set, key_value_dir_get.
    index, count: of the processes.
  """

  def __init__(self, client: Any, index: int, count: int) -> None:
    self._client, self._index, self._count = client, index, count
    self._over, self._leaving = threading.Event(), threading.Lock()
    self._seen: dict[int, tuple[str, float]] = {}
    self._say(_ALIVE, "0")
    threading.Thread(target=self._run, name="processes", daemon=True).start()

  def done(self) -> None:
    """Ends the watch: this process has nothing more to do."""
    self._say(_ENDED, "")
    self._over.set()

  def leave(self, text: str, *, said: bool = False, status: int = 1) -> None:
    """Ends this process with one line on stderr, and lets the others know why.

    Args:
      said: stderr has it already.
    """
    self._leaving.acquire()  # to the end: the other thread may have a reason of its own
    self._over.set()
    if not said:
      _print_error(text)
    with contextlib.suppress(Exception):  # the coordinator may be gone, which ends the others too
      self._say(_ENDED, text or "an error")
      if self._index == 0:  # the coordinator: the others read it here
        end = time.monotonic() + _FAREWELL
        while len(self._client.key_value_dir_get(_ENDED)) < self._count and time.monotonic() < end:
          time.sleep(0.1)
    # Not sys.exit: JAX would wait for the others, which wait for this one.
    with contextlib.suppress(OSError):
      sys.stdout.flush()
    os._exit(status)

  def leave_after_others(self, text: str) -> None:
    """Ends after an operation over all processes failed: most often because another one ended."""
    time.sleep(3 * _BEAT)  # the thread knows it first, where the other one could say why
    self.leave(
      f"An operation over all {self._count} processes failed ({cut(text)}); another process has"
      " ended or cannot be reached. Start all of them again: the run goes on from its checkpoint."
    )

  def _run(self):
    beats = 0
    while not self._over.wait(_BEAT):
      beats += 1
      try:
        self._say(_ALIVE, str(beats))
        ended, alive = (self._read(what) for what in (_ENDED, _ALIVE))
      except Exception as error:  # JAX's own kinds
        if not self._over.is_set():
          self.leave(f"process 0, the coordinator, cannot be reached ({reason(error)}).")
        return
      for index, text in ended.items():
        if text and index != self._index and not self._over.is_set():
          self.leave(f"process {index} of {self._count} has ended: {text}")
      silent = self._silent(alive.items() - {(i, alive[i]) for i in ended if i in alive})
      if silent is not None and not self._over.is_set():
        self.leave(
          f"process {silent} of {self._count} has not been heard of for {_SILENCE} seconds. Start"
          " all of them again: the run goes on from its checkpoint."
        )

  def _silent(self, alive) -> int | None:
    now = time.monotonic()
    for index, beat in alive:
      if self._seen.get(index, ("", 0))[0] != beat:
        self._seen[index] = (beat, now)
      if now - self._seen[index][1] > _SILENCE:
        return index
    return None

  def _say(self, what, text):
    self._client.key_value_set(f"{what}/{self._index}", cut(text), allow_overwrite=True)

  def _read(self, what) -> dict[int, str]:
    pairs = self._client.key_value_dir_get(what)
    return {int(key.rpartition("/")[2]): value for key, value in pairs}


def _print_error(text):
  print(f"error: {text}", file=sys.stderr, flush=True)
