"""Which device programs are made for: this process's own, or one that is not here."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
  """A device that programs are compiled for ahead of time.

  Attributes:
    platform: as jax.default_backend() names it: "cpu", "gpu", "tpu".
    kind: jax's device_kind.
    memory: bytes that a process may take of it; None: not known.
  """

  platform: str
  kind: str
  memory: int | None


_NAMED: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def named() -> Target | None:
  """Returns the device that programs are made for where it is not this process's own."""
  return _NAMED.get()


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
  """Has every choice of an implementation inside made for this device, without trying it out."""
  token = _NAMED.set(target)
  try:
    yield
  finally:
    _NAMED.reset(token)


def platform() -> str:
  """Returns the platform that programs are made for."""
  target = _NAMED.get()
  return target.platform if target else jax.default_backend()


def kind() -> str:
  """Returns jax's device_kind of what programs are made for."""
  target = _NAMED.get()
  return target.kind if target else jax.local_devices()[0].device_kind


def memory() -> int | None:
  """Bytes that this process may use of its first device, or of the one that was named.

  None where it is not known (CPU).
  """
  target = _NAMED.get()
  if target:
    return target.memory
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit")
