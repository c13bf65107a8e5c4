"""Which steps a profile holds, without a run."""

import types
from pathlib import Path

import jax
import pytest

from refine_jax.config import LogConfig
from refine_jax.training import train


def profiled(monkeypatch, profile_steps, steps) -> list:
  """What is asked of JAX's profiler in a run of these steps that ends after the last."""
  asked = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: asked.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: asked.append("stop"))
  config = types.SimpleNamespace(log=LogConfig(profile_steps=profile_steps))
  loop = types.SimpleNamespace(config=config, workdir=Path("run"), profiling=False)
  for step in [*steps, 6 + 1]:
    train._Loop._profile(loop, step)
    asked.append(step)
  return asked


@pytest.mark.parametrize(
  ("profile_steps", "steps", "expected"),
  [
    ((2, 3), [1, 2, 3, 4], [1, "start", 2, 3, "stop", 4, 7]),
    ((5, 6), [5, 6], ["start", 5, 6, "stop", 7]),
    ((1, 5), [4, 5, 6], ["start", 4, 5, "stop", 6, 7]),
    ((1, 2), [4, 5], [4, 5, 7]),
    ((0, 0), [1, 2], [1, 2, 7]),
  ],
  ids=["inside", "to the last step", "resumed in its middle", "resumed after it", "none"],
)
def test_a_profile_holds_its_steps_whenever_the_run_starts_and_ends(
  monkeypatch, profile_steps, steps, expected
):
  assert profiled(monkeypatch, profile_steps, steps) == expected
