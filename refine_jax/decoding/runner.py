"""The device's side of an engine: its rows, their growth, and the programs that run over them."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from refine_jax.attention import cached
from refine_jax.decoding import device_memory, dispatch, programs, sampler
from refine_jax.decoding import state as state_lib
from refine_jax.decoding.loading import Model
from refine_jax.decoding.settings import Settings
from refine_jax.decoding.state import Pieces, State
from refine_jax.interrupt import held_back

# Tokens of a piece of a prompt, and the least pieces of a pass over them, which many slots exceed.
_PIECE, _PIECES = 128, 4
# Places of the smallest cache. The kernel reads none that is empty, the other engine reads all.
_LEAST_PLACES = {"kernel": 4096, "xla": 512}
# Program -> what a user is told who waits for it.
_NAMES = {"enter": "prompts", "decode": "passes", "traced": "traced passes"}


@dataclasses.dataclass
class Costs:
  """What an engine has spent.

  Attributes:
    prefill_seconds, decode_seconds: wall clock of programs, without compilation.
    compile_seconds, programs: of programs that were not there.
  """

  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  compile_seconds: float = 0.0
  programs: int = 0

  def since(self, before: "Costs") -> "Costs":
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(before), strict=True)
    return Costs(*(now - then for now, then in pairs))


def _time_of(mark: jax.Array) -> float:
  """When it was there, by time.perf_counter."""
  jax.block_until_ready(mark)
  return time.perf_counter()


class Runner:
  """Rows on a device, and the programs that put prompts into them and run passes.

  Attributes:
    settings: what the programs are made for.
    plan: those of passes, which may change between two calls; else the same.
    slots: rows.
    pieces, piece: how many pieces of prompts a pass takes, and how many tokens each.
    state: State; None before the first row.
    rows: as the last passes left them, until the next ones start.
    costs: what was spent.
  """

  rows: dispatch.Rows

  def __init__(self, model: Model, slots: int, settings: Settings) -> None:
    self.config, self.slots, self.settings = model.config, slots, settings
    self.plan = settings
    self._params_of: dict[Settings, dict] = {}
    self._model = model
    self.pieces = min(slots, max(_PIECES, slots // 4))
    self.piece = max(_PIECE, programs.bucket(settings.drafts_of_prompt + 1, 1))
    self.state: State | None = None
    self.costs = Costs()
    leaf = jax.tree.leaves(self.params["layers"][0])[0]
    self._dtype, self._sharding, self._parts = leaf.dtype, leaf.sharding, 1
    cache = leaf.sharding
    if isinstance(leaf.sharding, NamedSharding):
      self._sharding = cache = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    if settings.mesh:
      self._parts = settings.mesh.shape["tensor"]
      cache = NamedSharding(settings.mesh, cached.CACHE)
    # Where the state lives, as a prefix of it.
    places: Any = State._make([self._sharding] * len(State._fields))
    self._places = places._replace(caches=cache)
    self._programs: dict[Any, Callable] = {}
    # On a GPU a program with a loop runs within the call that starts it: only another thread sees
    # when what came before it ended.
    self._clock = futures.ThreadPoolExecutor(1)
    self._prompts: futures.Future[float] | None = None
    self._report: jax.Array | None = None
    self._entered_at = self._prompts_ended_at = self._started_at = 0.0
    self._sampling = "any"

  @property
  def params(self) -> dict:
    """The parameters of prompts' passes: an adapter's are for drafts alone."""
    if not self.settings.drafts_of_prompt:
      return self._model.base_decoding_params
    return self._params(self.settings)

  def _params(self, settings: Settings) -> dict:
    if settings not in self._params_of:
      adapted, tokens = settings.adapted, self.slots * settings.tokens
      found = self._model.decoding_params(tokens) if adapted else self._model.base_decoding_params
      self._params_of[settings] = found
    return self._params_of[settings]

  @property
  def size(self) -> int:
    """Places of each row's cache."""
    return 0 if self.state is None else self.state.tokens.shape[1]

  def sent_pieces(self) -> tuple[np.ndarray, Pieces]:
    """What `enter` takes, and the pieces to be written into it."""
    return dispatch.sent_pieces(self.settings, self.slots, self.pieces, self.piece)

  def enter(self, sent: np.ndarray) -> None:
    """Starts dispatch.enter, and does not wait for it."""
    if self._prompts is None:
      self._entered_at = time.perf_counter()
    self.state, mark = self._program("enter")(self.params, self.state, sent)
    self._prompts = self._clock.submit(_time_of, mark)

  def wait(self) -> None:
    """Waits until what `enter` started has ended."""
    prompts, self._prompts = self._prompts, None
    if prompts is not None:
      self._prompts_ended_at = prompts.result()
      self.costs.prefill_seconds += self._prompts_ended_at - self._entered_at

  def start(self, ended: np.ndarray, passes: int, least_active: int) -> None:
    """Starts dispatch.decode; on a GPU this returns when its loop has ended."""
    if jax.default_backend() == "cpu":  # It may run in this call, whose time then is its own.
      self.wait()
    self._started_at = time.perf_counter()
    sent = dispatch.sent_rows(ended, passes, least_active)
    program, params = self._program("decode"), self._params(self.plan)
    self.state, self._report, self.rows = program(params, self.state, sent)

  def report(self) -> np.ndarray:
    """Waits for what `start` started; returns sampler.decode's report, int32 [3, B]."""
    self.wait()
    report = np.asarray(self._report)
    begun = max(self._started_at, self._prompts_ended_at)
    self.costs.decode_seconds += time.perf_counter() - begun
    return report

  def decode(self, ended: np.ndarray, passes: int, least_active: int) -> np.ndarray:
    """Runs sampler.decode; returns its report."""
    self.start(ended, passes, least_active)
    return self.report()

  def traced_pass(self, ended: np.ndarray) -> tuple[np.ndarray, sampler.Seen]:
    """Runs sampler.traced_pass; returns its report and what it saw, on the host."""
    self.wait()
    start = time.perf_counter()
    self.state, *seen = self._program("traced")(self._params(self.plan), self.state, ended)
    report, seen = jax.device_get(seen)
    self.rows = self._rows()
    self.costs.decode_seconds += time.perf_counter() - start
    return report, seen

  def fetch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The rows' tokens [B, S], accepted counts [B, most] and probabilities [B, S], on the host.

    These only where Settings.log_probabilities is true.
    """
    return jax.device_get(self._rows())

  def _rows(self) -> dispatch.Rows:
    assert self.state is not None
    probability = self.state.probability if self.settings.log_probabilities else None
    return self.state.tokens, self.state.accepted, probability

  # Memory.

  def check_memory(self, places: int) -> None:
    """Raises UserError where the device has no room for rows of so many tokens."""
    size = self._size_for(places)
    if size > self.size:
      device_memory.require(
        self._bytes(size) - self._bytes(self.size),
        self._device,
        f"The caches of {self.slots} rows of {size} tokens",
        "decode fewer rows at a time (batch_size, slots), or fewer tokens (max_new_tokens)",
      )

  def grow(self, places: int) -> None:
    """Gives every row at least so many places."""
    size = self._size_for(places)
    if size <= self.size:
      return
    self._programs.clear()
    if self.state is None:
      more = {"rows": self.slots, "size": size, "dtype": self._dtype}
      make = functools.partial(state_lib.empty, self.config, self.settings, **more)
      self.state = self._once(make, place=self._places)()
      return
    tokens = (self.state.tokens, self.state.probability, self.state.choices.noise_token)
    grow_tokens = self._once(functools.partial(state_lib.grow_tokens, size=size), *tokens)
    caches = list(self.state.caches)
    more = functools.partial(state_lib.grow_cache, size=size)
    grow_cache = self._once(more, caches[0], place=self._places.caches)
    with held_back():
      # A layer at a time, so that both sizes of all layers are never there together.
      for i in range(len(caches)):
        self.state.caches[i] = caches[i] = grow_cache(caches[i])
      grown, probability = grow_tokens(*tokens)
      self.state = self.state._replace(tokens=grown, probability=probability, caches=caches)

  def _size_for(self, places: int) -> int:
    least = _LEAST_PLACES[self.settings.engine]
    # Fewer where many would take much of the memory.
    while (
      least > _LEAST_PLACES["xla"] and self._bytes(least) > device_memory.total(self._device) // 8
    ):
      least //= 2
    return programs.bucket(places, least)

  def _bytes(self, size: int) -> int:
    return state_lib.cache_bytes(self.config, self.slots, size, self._dtype) // self._parts

  @property
  def _device(self) -> Any:
    return min(self._sharding.device_set, key=lambda device: device.id)

  # Programs.

  def prepare(
    self, *, traced: bool = False, samples: bool = False, plans: Sequence[Settings] = ()
  ) -> None:
    """Makes the programs that are not there for the calls that follow.

    Args:
      traced: whether `traced_pass` is to be called, and not `decode`.
      samples: whether a row has a temperature.
      plans: that passes will follow; default: `plan`.
    """
    if jax.default_backend() == "gpu":
      self._sampling = "sampled" if samples else "greedy"
    passes = "traced" if traced else "decode"
    wanted = [("enter", self.settings), *((passes, plan) for plan in plans or (self.plan,))]
    missing = [pair for pair in wanted if self._key(*pair) not in self._programs]
    if missing:
      with self._precision():
        made, new, seconds = programs.compiled(*(self._job(*pair) for pair in missing))
      for pair, program in zip(missing, made, strict=True):
        self._programs[self._key(*pair)] = program
      self.costs.programs += new
      self.costs.compile_seconds += seconds

  def _precision(self) -> contextlib.AbstractContextManager:
    """Products of float32 in float32: GPUs would round them, and near ties would fall otherwise."""
    config: Any = jax.config
    given = config.jax_default_matmul_precision is not None
    if given or self._dtype != np.float32:
      return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")

  def _program(self, name: str) -> Callable:
    settings = self.settings if name == "enter" else self.plan
    return self._programs[self._key(name, settings)]

  def _key(self, name: str, settings: Settings) -> tuple:
    return name, settings, self._sampling, programs.context()

  def _job(self, name: str, settings: Settings) -> programs.Job:
    ended, passes = np.zeros(self.slots, bool), self.slots * settings.tokens
    state, rest = self._places, self._sharding
    function, sent, tokens, places = {
      "enter": (dispatch.enter, self.sent_pieces()[0], self.pieces * self.piece, (state, rest)),
      "decode": (dispatch.decode, dispatch.sent_rows(ended, 1, 1), passes, (state, rest, rest)),
      "traced": (sampler.traced_pass, ended, passes, (state, rest, rest)),
    }[name]
    # Prompts' drafts are greedy, so all have one program for them.
    sampling = "any" if name == "enter" else self._sampling
    settings = dataclasses.replace(settings, sampling=sampling)
    return programs.Job(
      programs.jitted(function, self.config, settings, places),
      (self.params if name == "enter" else self._params(settings), self.state, sent),
      programs.compiler_options(tokens),
      f"{_NAMES[name]} ({self.slots} rows of up to {self.size} tokens)",
    )

  def _once(self, function: Callable, *arguments: Any, place: Any = None) -> Callable:
    """A program for one use, counted; `place` is that of its results, where they are split."""
    start = time.perf_counter()
    program = jax.jit(function, out_shardings=place or self._sharding)
    program = program.lower(*arguments).compile()
    self.costs.compile_seconds += time.perf_counter() - start
    self.costs.programs += 1
    return program
