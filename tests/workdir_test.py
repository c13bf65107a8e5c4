"""A workdir belongs to one run: whose it is, who holds it, and what a restart does there."""

import json
import shutil
import signal

import hf_fixtures
import jax
import numpy as np
import pytest
from data_fixtures import write_parquet

from configs import base
from refine_jax import config as config_lib
from refine_jax import interrupt, lock
from refine_jax.checkpoint import checkpointer
from refine_jax.errors import UserError
from refine_jax.training import duties, train
from refine_jax.training import workdir as workdir_lib


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A tiny model and a few rows."""
  directory = tmp_path_factory.mktemp("place")
  model, _ = hf_fixtures.tiny_hf_model("llama", directory, num_hidden_layers=1)
  hf_fixtures.words_tokenizer().save_pretrained(model)
  model.rename(directory / "model")
  write_parquet(directory / "a.parquet", ["w3 w4"] * 40, ["w5 w6 w7"] * 40)
  write_parquet(directory / "b.parquet", ["w3 w4"] * 40, ["w5 w6 w8"] * 40)
  return directory


@pytest.fixture(scope="module")
def configure(place):
  """A function of section__key=value that gives the frozen config of a run of 3 steps."""

  def make(**changes):
    config = base.get_config()
    values = {
      "model.config": str(place / "model"),
      "model.compute_dtype": "float32",
      "data.train_files": str(place / "a.parquet"),
      "data.val_files": str(place / "b.parquet"),
      "data.max_length": 16,
      "data.pack": False,
      "data.chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
      "optim.batch_size": 8,
      "optim.total_steps": 3,
      "checkpoint.save_every": 2,
      "checkpoint.save_hf": True,
      "eval.eval_every": 2,
      "log.logger": ("console",),
      "log.debug_every": 0,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(values)
    return config_lib.from_config_dict(config)

  return make


@pytest.fixture(scope="module")
def finished(configure, tmp_path_factory):
  """The workdir of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  assert train.run(configure(), str(workdir)) == 0
  return workdir


@pytest.fixture
def used(finished, tmp_path):
  """A copy of it that a test may change."""
  return shutil.copytree(finished, tmp_path / "run")


def contents(directory):
  """Path -> bytes and time of every file."""
  return {
    p.relative_to(directory): (p.read_bytes(), p.stat().st_mtime_ns)
    for p in directory.rglob("*")
    if p.is_file()
  }


def drop_records(workdir, step, prefix):
  """Removes the metrics of a step whose names start like this, as if it had not come to them."""
  path = workdir / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  kept = [r for r in lines if r["step"] != step or not any(k.startswith(prefix) for k in r)]
  assert len(kept) < len(lines)
  path.write_text("".join(json.dumps(r) + "\n" for r in kept))


def records(workdir, step, name):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [r[name] for r in lines if r["step"] == step and name in r]


def test_a_complete_run_is_left_as_it_is(used, configure, capsys):
  before = contents(used)
  assert train.run(configure(), used) == 0
  assert "complete" in capsys.readouterr().out
  assert contents(used) == before


def test_what_followed_the_last_checkpoint_and_is_missing_is_done_by_the_next_start(
  used, finished, configure
):
  drop_records(used, 3, "eval/")
  shutil.rmtree(used / "global_step_3")
  assert train.run(configure(), used) == 0
  for name in ("eval/loss_total", "eval/accuracy_s0"):
    assert records(used, 3, name) == records(finished, 3, name) != []
  weights = "global_step_3/huggingface/model.safetensors"
  assert (used / weights).read_bytes() == (finished / weights).read_bytes()


def test_a_signal_where_validation_is_due_leaves_it_to_the_next_start(
  tmp_path, finished, configure, monkeypatch
):
  def at_step_two(self, step):
    self._signal = signal.SIGTERM if step == 2 else None
    return step == 2

  with monkeypatch.context() as patch:
    patch.setattr(interrupt.Interrupt, "requested", at_step_two)
    assert train.run(configure(), tmp_path / "run") == 128 + signal.SIGTERM
  workdir = tmp_path / "run"
  assert not records(workdir, 2, "eval/loss_total")
  assert train.run(configure(), workdir) == 0
  for step in (2, 3):
    assert records(workdir, step, "eval/loss_total") == records(finished, step, "eval/loss_total")
  ours, theirs = (checkpointer.restore_params(w)[0]["embedding"] for w in (workdir, finished))
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
  "change, said",
  [
    ({"seed": 1}, "seed 0 there, 1 here"),
    ({"noise__noise_max": 0.5}, "noise.noise_max 0.9 there, 0.5 here"),
    ({"objective__clean_weight": 0.5}, "objective.clean_weight 0.0 there, 0.5 here"),
    ({"optim__batch_size": 16}, "optim.batch_size 8 there, 16 here"),
    ({"optim__total_steps": 4}, "optim.total_steps 3 there, 4 here"),
    ({"data__max_length": 24}, "data.max_length 16 there, 24 here"),
    ({"data__train_files": "b.parquet"}, "data 40 examples"),
  ],
)
def test_a_run_with_other_values_is_refused_by_their_names_and_left_alone(
  used, place, configure, change, said
):
  if "data__train_files" in change:
    change = {"data__train_files": str(place / change["data__train_files"])}
  before = contents(used)
  with pytest.raises(UserError, match="allow_changes") as error:
    train.run(configure(**change), used)
  assert said in str(error.value) and contents(used) == before


def test_an_allowed_change_goes_on_and_stays_in_the_history(used, place, configure, capsys):
  shutil.rmtree(used / "checkpoints" / "3")
  other = str(place / "b.parquet")
  changes = {"data__train_files": other, "eval__eval_every": 3}
  assert train.run(configure(**changes, checkpoint__allow_changes=("data",)), used) == 0
  assert "eval.eval_every 2 -> 3" in capsys.readouterr().out
  written = json.loads((used / "config.json").read_text())
  assert written["data"]["train_files"] == other
  (entry,) = written["history"]
  assert entry["step"] == 2 and entry["changed"]["eval.eval_every"] == [2, 3]
  assert checkpointer.steps(used / "checkpoints") == [2, 3]
  # The step was taken again on other data: its export is not the one that was there.
  old, new = (used / f"global_step_3{name}" for name in (".replaced", ""))
  weights = "huggingface/model.safetensors"
  assert (old / weights).read_bytes() != (new / weights).read_bytes()


def test_a_name_that_is_not_compared_cannot_be_allowed(tmp_path, configure):
  with pytest.raises(UserError, match="'sead', which is not compared.*Did you mean 'seed'"):
    train.run(configure(checkpoint__allow_changes=("sead",)), tmp_path / "run")
  assert not list(tmp_path.iterdir())  # a start that fails leaves no workdir behind


def test_a_data_position_that_is_not_the_steps_is_set_aside(used, configure):
  step = used / "checkpoints" / "3"
  record = json.loads((step / "record" / "metadata").read_text())
  del record["crc"]
  record["position"] = {"next_index": 4}
  (step / "record" / "metadata").write_text(json.dumps(record))
  assert train.run(configure(), used) == 0
  assert (used / "checkpoints" / "3.damaged").is_dir()
  assert checkpointer.steps(used / "checkpoints") == [2, 3]


def test_a_run_writes_to_folders_that_were_made_or_linked_for_it(tmp_path, configure):
  workdir = tmp_path / "run"
  for folder in (workdir / "log", tmp_path / "large"):
    folder.mkdir(parents=True)
  (workdir / "checkpoints").symlink_to(tmp_path / "large")
  assert train.run(configure(checkpoint__save_hf=False), str(workdir)) == 0
  assert checkpointer.steps(tmp_path / "large") == [2, 3]
  (workdir / "config.json").unlink()
  assert train.run(configure(checkpoint__save_hf=False), str(workdir)) == 0


def test_a_directory_that_is_not_a_runs_is_refused_and_left_alone(place, tmp_path, configure):
  home = tmp_path / "home"
  (home / ".ssh").mkdir(parents=True)
  for directory in (place / "model", place, home):
    before = contents(directory)
    with pytest.raises(UserError, match="is not of a run and holds"):
      train.run(configure(), directory)
    assert contents(directory) == before


def test_an_empty_directory_or_one_with_a_log_is_a_new_workdir(tmp_path, configure):
  (tmp_path / "slurm-17.out").write_text("")
  workdir_lib.check_workdir(tmp_path, configure())


@pytest.mark.parametrize("value", ["gs://bucket/run", "~nosuchuser/x", "x" * 5000, "run[1]"])
def test_an_impossible_workdir_is_one_line_before_anything_is_made(
  tmp_path, configure, value, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="--workdir"):
    train.run(configure(), value)
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, configure):
  (tmp_path / "file").write_text("")
  for name in ("file", "file/run"):
    with pytest.raises(UserError, match=str(tmp_path / "file")):
      train.run(configure(), tmp_path / name)


def test_a_tilde_in_the_workdir_is_the_home_directory(used, configure, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(used.parent))
  assert train.run(configure(), "~/run") == 0
  assert "complete" in capsys.readouterr().out


def test_a_second_process_on_a_workdir_is_refused(used, configure):
  with lock.lock(used / ".lock", "it"), pytest.raises(UserError, match="in use by process"):
    train.run(configure(), used)


def at_step(monkeypatch, step, do):
  """Has `do` called while step `step` runs, after the last checkpoint before it is whole."""
  take = train._Loop._next_batch

  def next_batch(loop):
    loop.checkpointer.wait()
    if (loop.checkpointer.latest_step() or 0) + 1 == step:
      do()
    return take(loop)

  monkeypatch.setattr(train._Loop, "_next_batch", next_batch)


def test_a_workdir_moved_while_running_is_made_anew_for_a_last_checkpoint(
  configure, tmp_path, monkeypatch
):
  workdir, moved = tmp_path / "run", tmp_path / "moved"
  at_step(monkeypatch, 3, lambda: workdir.rename(moved))
  config = configure(optim__total_steps=9, checkpoint__save_hf=False)
  with pytest.raises(UserError, match=r"run was removed or moved .* newest checkpoint: step 3\."):
    train.run(config, str(workdir))
  assert checkpointer.steps(workdir / "checkpoints") == [3]
  assert checkpointer.steps(moved / "checkpoints") == [2]
  monkeypatch.undo()
  assert train.run(config, str(workdir)) == 0  # goes on from there


def test_a_run_leaves_what_another_has_at_its_place_as_it_is(configure, tmp_path, monkeypatch):
  workdir, moved = tmp_path / "run", tmp_path / "moved"
  others = []

  def replace():
    workdir.rename(moved)
    workdir.mkdir()
    others.append(lock.Lock(workdir / ".lock", "it"))

  at_step(monkeypatch, 3, replace)
  with pytest.raises(UserError, match="run is in use by process"):
    train.run(configure(optim__total_steps=9), str(workdir))
  assert [p.name for p in workdir.iterdir()] == [".lock"]
  assert others[0].keep()
  others[0].release()


def test_more_steps_than_can_be_counted_are_refused_before_anything_is_trained(tmp_path, configure):
  config = configure(optim__total_steps=-1, optim__total_epochs=10**9)
  with pytest.raises(UserError, match="total_epochs=1000000000 makes 5000000000 steps"):
    train.run(config, tmp_path / "run")
  assert not list(tmp_path.iterdir())


def test_a_profile_is_begun_where_the_run_goes_on_and_ended_with_it(used, configure, monkeypatch):
  shutil.rmtree(used / "checkpoints" / "3")
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  assert train.run(configure(log__profile_steps=(1, 3)), used) == 0
  assert calls == [str(used / "profile"), "stop"]


@pytest.mark.parametrize(
  "step, stops, wanted",
  [
    (1, False, (False, False, False, False)),
    (1, True, (True, True, False, False)),
    (2, False, (True, True, True, False)),
    (2, True, (True, True, False, False)),
    (3, True, (True, True, True, False)),
  ],
)
def test_duties_of_a_step(configure, step, stops, wanted):
  due = duties.due(configure(), step, total=3, validation=True, stops=stops)
  assert (due.save, due.export, due.validate, due.answer) == wanted


def test_a_metrics_file_with_half_a_line_still_tells_what_was_done(tmp_path, configure):
  config = configure(checkpoint__save_hf=False)
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 2, "eval/loss_total": null}\n[1]\n{"st\xff')
  arguments = (config, tmp_path)
  assert not duties.missing(*arguments, 2, total=4, validation=True)
  assert duties.missing(*arguments, 4, total=4, validation=True).validate
