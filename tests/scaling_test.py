"""The benchmark of several devices: rows, beside one device and beside projections."""

import json

import pytest

from benchmarks import mesh_step, scaling, timing
from refine_jax.training import flops

TINY = timing.SHAPES["tiny"]


def test_a_row_is_what_its_step_took_and_sent(monkeypatch, capsys):
  monkeypatch.setattr(flops, "peak_flops", lambda: 2e12)
  options = ("--one=measured", "--shape=tiny", "--rows=1", "--accumulation=2", "--repeats=1")
  (row,) = scaling.main([*options, "--meshes=2x1x1"])
  assert json.loads(capsys.readouterr().out) == row
  assert (row["devices"], row["rows_a_device"], row["length"]) == (2, 1, TINY.length)
  tokens = 2 * 2 * TINY.length
  assert row["tokens_per_second"] == pytest.approx(tokens / row["step_ms"] * 1e3)
  assert row["tokens_per_second_device"] == pytest.approx(row["tokens_per_second"] / 2)
  mfu = row["tokens_per_second_device"] * row["flops_per_token"] / 2e12
  assert row["mfu"] == pytest.approx(mfu)
  (sent,) = row["collectives"]
  assert sent["kind"] == "all-reduce" and sent["devices"] == 2
  # Gradients once for both micro-batches: the embedding, the head and the layers, in float32.
  assert sent["bytes"] > 4 * 2 * TINY.model.vocab_size * TINY.model.width


def test_speeds_stand_beside_those_of_one_such_device():
  alone = [
    {"device": "a", "accumulation": 1, "tokens_per_second_device": 50.0},
    {"device": "a", "accumulation": 8, "tokens_per_second_device": 80.0},
  ]
  rows = [
    {"device": "a", "accumulation": 8, "tokens_per_second_device": 72.0},
    {"device": "a", "accumulation": 1, "tokens_per_second_device": [40.0, 45.0]},
    {"device": "b", "accumulation": 1, "tokens_per_second_device": 1.0},
    {"device": "a", "accumulation": 1},
  ]
  for row in rows:
    scaling.compared(row, alone)
  assert [row.get("of_one_device") for row in rows] == [0.9, [0.8, 0.9], None, None]


def test_what_is_computed_anew_counts_as_reached():
  row = {"mfu": 0.3, "remat": "none", "length": TINY.length}
  assert mesh_step.efficiency(row, "tiny") == 0.3
  forward = flops.matmul_flops_per_token(TINY.model)
  again = mesh_step.efficiency(row | {"remat": "full"}, "tiny") / 0.3 - 1
  # A forward pass beside three, but for the head.
  head = 2 * TINY.model.width * TINY.model.vocab_size / forward
  assert again == pytest.approx((1 - head) / 3, rel=0.05)
  assert mesh_step.efficiency(row | {"mfu": None}, "tiny") is None


@pytest.mark.slow
def test_every_mesh_runs_in_a_process_of_its_own_and_once(tmp_path, monkeypatch, capfd):
  output = tmp_path / "rows.jsonl"
  options = ["--shape=tiny", "--rows=1", "--repeats=1", "--meshes=1x1x1,1x2x1"]
  options += ["--project=1x1x2", f"--output={output}"]
  rows = scaling.main(options)
  kinds = [(row["row"], row["mesh"]) for row in rows]
  assert kinds == [("measured", "1x1x1"), ("measured", "1x2x1"), ("projected", "1x1x2")]
  assert rows[0]["of_one_device"] == 1 and rows[1]["of_one_device"] > 0
  # The CPU's peak is not known, so nothing is projected but what is sent.
  assert rows[2]["collectives"] and "step_ms" not in rows[2]
  written = [json.loads(x) for x in output.read_text().splitlines()]
  assert [(x["row"], x["mesh"]) for x in written] == kinds
  # Started again it has nothing to do.
  monkeypatch.setattr(scaling, "in_own_process", lambda *a: pytest.fail("ran again"))
  assert [x["step_ms"] for x in scaling.main(options)[:2]] == [x["step_ms"] for x in rows[:2]]
  assert "of_one_device" in capfd.readouterr().out


def test_a_mesh_is_three_sizes():
  with pytest.raises(scaling.UserError, match="'2x1' is no mesh"):
    scaling.main(["--meshes=2x1"])
