"""How much memory a device has, and errors before more is asked for."""

import os
from typing import Any

from refine_jax.errors import UserError


def total(device: Any) -> int:
  """Bytes that a process may take of a device's memory."""
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free(device: Any) -> int:
  """Bytes of a device's memory that nothing has taken."""
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require(size: int, device: Any, what: str, advice: str) -> None:
  """Raises UserError where a device has not so many bytes free."""
  there = free(device)
  if size > there:
    raise UserError(
      f"{what} take {size / 2**30:.1f} GiB, and {device.device_kind} has {there / 2**30:.1f} GiB"
      f" free; {advice}."
    )
