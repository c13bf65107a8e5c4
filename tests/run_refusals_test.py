"""Bad input to a run: one line on stderr, status one, and no checkpoint."""

import pyarrow
import pyarrow.parquet
import pytest
from run_fixtures import ROOT, make_data, train, train_process


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs")
  make_data(directory)
  return directory


BAD = {
  "mistyped key": (["--config.optim.lrr=1.0"], "lr"),
  "wrong type": (["--config.optim.batch_size=many"], "batch_size"),
  "weights": (["--config.objective.loss_weights=(1.0,)"], "loss_weights has 1 values"),
  "noise order": (["--config.noise.noise_min=0.95"], "noise_min=0.95 and noise_max=0.9"),
  "noise range": (["--config.noise.noise_max=1.5"], "noise_max=1.5"),
  "micro-batches": (["--config.optim.accumulation=3"], "not divisible"),
  "devices": (["--config.mesh.fsdp=3", "--config.mesh.data=1"], "needs 3 devices"),
  "no file": (["--config.data.train_files=gone.parquet"], "correct config.data.train_files"),
  "no column": (["--config.data.prompt_key=question"], "prompt, target"),
  "not parquet": (["--config.data.train_files=data/tiny/model/config.json"], "config.json"),
  "choice": (["--config.data.truncation=middle"], "error, left, right"),
  "noise kind": (["--config.noise.kind=blocks"], "'block'"),
  "problems": (["--config.eval.generate_every=2"], "generate_file go together"),
  "mistyped section": (["--config.optm.lr=1.0"], "did you mean 'optim'?"),
  "no config file": (["--config=nowhere.py"], "nowhere.py"),
  "no recipe": (
    [f"--config={ROOT}/configs/tiny.py:block"],
    "one of uniform, blocks, gated, ar_sft",
  ),
  "no model": (["--config.model.config=nowhere/at/all/"], "nowhere"),
}


# As a process, which has one device; the others in this one.
AS_PROCESSES = ("devices", "mistyped key")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_one(place, case):
  arguments, message = BAD[case]
  run = train_process if case in AS_PROCESSES else train
  result = run(place, place / "bad", *arguments, check=False)
  assert result.returncode == 1, result.stdout
  assert "Traceback" not in result.stderr
  errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1 and message in errors[0], result.stderr
  assert not (place / "bad" / "checkpoints").exists()


def test_all_rows_dropped(place):
  path = place / "empty.parquet"
  table = pyarrow.table({"prompt": ["a", None, "b"], "target": ["", "x", None]})
  pyarrow.parquet.write_table(table, path)
  result = train(place, place / "bad", f"--config.data.train_files={path}", check=False)
  assert result.returncode == 1 and "empty.parquet" in result.stderr
