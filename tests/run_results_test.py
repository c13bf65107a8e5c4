"""Runs in this process: exports, starts from weights, problems, workdirs that are refused."""

import json

import numpy as np
import pytest
from run_fixtures import assert_equal_trees, make_data, parameters, records, script, train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs")
  make_data(directory)
  return directory


@pytest.fixture(scope="module")
def finished(place):
  """A run that nothing disturbed."""
  train(place, place / "finished")
  return place / "finished"


def test_export_reload_and_sample(place, finished):
  output = place / "exported"
  script(place, "scripts/export_hf.py", f"--workdir={finished}", f"--output={output}")
  assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
    p.name for p in output.iterdir()
  }
  card = (output / "README.md").read_text()
  assert "loss_s1" in card and '"num_iterations": 2' in card
  again = script(
    place, "scripts/export_hf.py", f"--workdir={finished}", f"--output={output}", check=False
  )
  assert again.returncode == 1 and "is not empty" in again.stderr
  for model in (output, finished):
    result = script(
      place, "scripts/sample.py", f"--model={model}", "--prompt=next abcd", "--max_new_tokens=5"
    )
    assert "Traceback" not in result.stderr


def test_a_run_in_blocks_answers_problems_and_writes_every_checkpoint_for_transformers(place):
  workdir = place / "with_hf"
  result = train(
    place,
    workdir,
    "--config.checkpoint.save_hf=True",
    "--config.optim.total_steps=3",
    "--config.noise.kind=block",
    "--config.noise.block_size=3",
    "--config.objective.clean_weight=0.5",
    "--config.eval.generate_every=2",
    "--config.eval.generate_file=data/tiny/test.parquet",
    "--config.eval.generate_rows=3",
    "--config.eval.generate_tokens=8",
  )
  assert "loss_clean" in result.stdout
  answered = [r for r in records(workdir) if "eval/solved" in r]
  assert [r["step"] for r in answered] == [2, 3]
  assert all(r["eval/tokens_per_pass"] >= 0 and r["eval/not_stopped"] <= 3 for r in answered)
  blocks = [r for r in records(workdir) if "eval/block/run_s0" in r]
  assert blocks and "eval/block/accuracy_s2/offset_2" in blocks[0]
  assert not any(key.startswith("eval/noise_") for r in blocks for key in r)
  import transformers

  transformers.AutoModelForCausalLM.from_pretrained(workdir / "global_step_2" / "huggingface")


def test_from_pretrained_weights(place, finished):
  output = place / "to_start_from"
  script(
    place,
    "scripts/export_hf.py",
    f"--workdir={finished}",
    f"--output={output}",
    "--dtype=float32",
  )
  result = train(
    place,
    place / "second",
    f"--config.model.pretrained={output}",
    "--config.model.config=",
    "--config.optim.total_steps=2",
    "--config.optim.lr=0.0",
  )
  assert "pretrained weights" in result.stdout
  assert_equal_trees(parameters(place / "second", 2), parameters(finished))


def test_many_nonfinite_steps_in_a_row_stop_the_run(place):
  result = train(
    place,
    place / "diverged",
    "--config.optim.lr=1e30",
    "--config.optim.max_nonfinite=2",
    "--config.optim.clip_grad=0.0",
    "--config.optim.total_steps=30",
    check=False,
  )
  assert result.returncode == 1
  assert "not finite for 2 steps in a row" in result.stderr and "Step " in result.stderr
  assert all(np.isfinite(parameters(place / "diverged", None)["embedding"]).ravel()[:5])


def test_another_models_workdir_is_refused_and_left_alone(place, finished):
  other = place / "other_model"
  other.mkdir()
  for file in (place / "data" / "tiny" / "model").iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
  before = (finished / "config.json").read_text()
  result = train(place, finished, f"--config.model.config={other}", check=False)
  assert result.returncode == 1 and "is of another model" in result.stderr
  assert (finished / "config.json").read_text() == before


def test_a_used_workdir_is_refused_where_resuming_is_off(place, finished):
  result = train(place, finished, "--config.checkpoint.resume_mode=disable", check=False)
  assert result.returncode == 1 and "resume_mode" in result.stderr
