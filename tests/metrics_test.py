"""Numbers of a run over time."""

import pytest

from refine_jax.training import metrics


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  return now


def test_throughput_is_a_mean_over_steps_and_survives_uneven_looks(clock):
  """Four steps of 2 s and 10 tokens; the host sees the third late and the fourth at once."""
  throughput = metrics.Throughput(flops_per_token=3.0, peak_flops=30.0, devices=2)
  assert throughput.read() == {}
  throughput.add(99)  # the clock starts at its end
  for wait in (2.0, 2.0, 3.9, 0.1):
    clock[0] += wait
    throughput.add(10)
  assert throughput.read() == pytest.approx(
    {"tokens_per_second": 5.0, "step_seconds": 2.0, "mfu": 5.0 * 3.0 / 60.0}
  )
  assert throughput.read() == {}  # nothing since
  clock[0] += 4
  throughput.add(10)
  assert throughput.read()["tokens_per_second"] == 2.5


def test_validation_does_not_count_as_training(clock):
  throughput = metrics.Throughput(flops_per_token=1.0, peak_flops=None, devices=1)
  throughput.add(10)
  clock[0] += 1
  throughput.add(10)
  throughput.restart()
  clock[0] += 1000  # validation
  throughput.add(10)
  assert throughput.read() == {}
  clock[0] += 2
  throughput.add(10)
  assert throughput.read() == {"tokens_per_second": 5.0, "step_seconds": 2.0}
