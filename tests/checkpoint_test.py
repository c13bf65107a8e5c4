"""Checkpoints: what is restored, what happens to damaged ones, and whose they are."""

import contextlib
import gc
import json
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny

from refine_jax import processes
from refine_jax.checkpoint import checkpointer as checkpoint
from refine_jax.checkpoint import checksums
from refine_jax.checkpoint.checkpointer import Checkpointer
from refine_jax.errors import UserError
from refine_jax.training.train_step import init_state

IDENTITY = {"width": 32}
# Orbax gives up at the first array that it cannot read and drops the reads of the others.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _dropped_reads_end_here():
  yield
  gc.collect()


def new_state(seed=0):
  step_config = tiny.step_config()
  return init_state(tiny.tiny_params(seed=seed), step_config.optim)


def new_iterator():
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(grain.MapDataset.source(list(range(100))).to_iter_dataset(options))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def saved(workdir, steps=(1,), keep=3):
  """A Checkpointer with a checkpoint at each of these steps, after as many batches."""
  checkpointer, iterator = Checkpointer(workdir, max_to_keep=keep), new_iterator()
  for step in range(1, max(steps) + 1):
    next(iterator)
    if step in steps:
      checkpointer.save(step, new_state(step), iterator, {"seed": step}, IDENTITY)
  checkpointer.wait()
  return checkpointer


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_state_iterator_and_config_come_back(tmp_path):
  checkpointer, iterator = saved(tmp_path, (1, 3)), new_iterator()
  state, step = checkpointer.restore(None, abstract(new_state()), iterator, IDENTITY)
  assert step == 3 and next(iterator) == 3
  assert_same(state, new_state(3))
  assert checkpoint.saved_record(tmp_path)["config"] == {"seed": 3}
  checkpointer.close()


def test_the_oldest_is_dropped(tmp_path):
  saved(tmp_path, (1, 2, 3), keep=2).close()
  assert checkpoint.steps(checkpoint.checkpoint_directory(tmp_path)) == [2, 3]


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  checkpointer, state = Checkpointer(tmp_path, max_to_keep=1), new_state()
  want = jax.device_get(state)
  checkpointer.save(1, state, new_iterator(), {}, IDENTITY)
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  jax.block_until_ready(overwrite(state))
  checkpointer.wait()
  got, _ = checkpointer.restore(1, abstract(new_state()), new_iterator(), IDENTITY)
  assert_same(got, want)
  checkpointer.close()


def test_parameters_alone_come_as_host_arrays(tmp_path):
  saved(tmp_path, (2,)).close()
  params, step = checkpoint.restore_params(tmp_path)
  assert step == 2 and isinstance(params["embedding"], np.ndarray)
  assert_same(params, new_state(2).params)
  with pytest.raises(UserError, match="no step 7; it has 2"):
    checkpoint.restore_params(tmp_path, 7)


def _halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncate(path):
  for file in path.rglob("*"):
    if file.is_file() and file.stat().st_size > 200:
      _halve(file)


@pytest.mark.parametrize(
  "damage",
  [
    _truncate,
    lambda path: shutil.rmtree(path / "state"),
    lambda path: shutil.rmtree(path / "record"),
  ],
)
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(tmp_path, damage, caplog):
  saved(tmp_path, (1, 2)).close()
  damage(tmp_path / "checkpoints" / "2")
  checkpointer, iterator = Checkpointer(tmp_path, max_to_keep=3), new_iterator()
  state, step = checkpointer.restore(None, abstract(new_state()), iterator, IDENTITY)
  assert step == 1 and next(iterator) == 1
  assert_same(state, new_state(1))
  assert "checkpoints/2 cannot be read" in caplog.text
  assert (tmp_path / "checkpoints" / "2.damaged").is_dir()  # set aside, not deleted
  checkpointer.save(2, new_state(5), iterator, {}, IDENTITY)
  checkpointer.wait()
  assert_same(checkpoint.restore_params(tmp_path, 2)[0], new_state(5).params)
  checkpointer.close()


def test_all_damaged_stops(tmp_path):
  saved(tmp_path).close()
  shutil.rmtree(tmp_path / "checkpoints" / "1" / "state")
  checkpointer = Checkpointer(tmp_path, max_to_keep=3)
  with pytest.raises(UserError, match="No checkpoint .* can be read"):
    checkpointer.restore(None, abstract(new_state()), new_iterator(), IDENTITY)
  checkpointer.close()
  # Whatever was wrong (a lack of memory, say) may not be the checkpoint's fault.
  assert checkpoint.steps(tmp_path / "checkpoints") == [1]


def test_another_models_checkpoint_is_refused_by_what_differs(tmp_path):
  checkpointer = saved(tmp_path)
  with pytest.raises(UserError, match="another model .*width 32 there, 64 here"):
    checkpointer.restore(None, abstract(new_state()), new_iterator(), {"width": 64})
  assert checkpointer.latest_step() == 1
  checkpointer.close()


def test_resume_paths(tmp_path):
  saved(tmp_path, (1, 2)).close()
  assert checkpoint.resolve_resume_path(str(tmp_path)) == (tmp_path, None)
  one = tmp_path / "checkpoints" / "1"
  assert checkpoint.resolve_resume_path(str(one)) == (tmp_path, 1)
  with pytest.raises(UserError, match="holds no checkpoint"):
    checkpoint.resolve_resume_path(str(tmp_path / "nowhere"))
  other = Checkpointer(tmp_path / "other", max_to_keep=1)
  state, path = other.restore_from(str(one), abstract(new_state()), new_iterator(), IDENTITY)
  assert path == one
  assert_same(state, new_state(1))
  other.close()


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [Path.unlink, _halve, _flip])
def test_damage_to_any_file_never_gives_another_state(tmp_path, damage):
  # Each file in turn: the newest comes back as it was saved, or the one before does.
  whole, iterator = tmp_path / "whole", new_iterator()
  states = {step: {"a": jnp.arange(999.0) * step, "b": jnp.int32(step)} for step in (1, 2)}
  with contextlib.closing(Checkpointer(whole, max_to_keep=2)) as checkpointer:
    for step, state in states.items():
      next(iterator)
      checkpointer.save(step, state, iterator, {}, IDENTITY)
  files = [p.relative_to(whole) for p in (whole / "checkpoints" / "2").rglob("*") if p.is_file()]
  fallbacks = 0
  for i, file in enumerate(files):
    shutil.copytree(whole, tmp_path / str(i))
    damage(tmp_path / str(i) / file)
    checkpointer = Checkpointer(tmp_path / str(i), max_to_keep=2)
    state, step = checkpointer.restore(None, abstract(states[1]), iterator, IDENTITY)
    assert next(iterator) == step, file
    assert_same(state, states[step])
    fallbacks += step == 1
  assert fallbacks >= 4


def test_silent_damage_is_not_exported(tmp_path):
  saved(tmp_path).close()
  files = (tmp_path / "checkpoints" / "1" / "state").rglob("*")
  _flip(max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size))
  with pytest.raises(UserError, match="checkpoints/1 cannot be read .*is not what was saved"):
    checkpoint.restore_params(tmp_path)


def test_checksums_do_not_depend_on_sharding():
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  tree = {"a": jax.random.normal(jax.random.key(0), (8, 6)), "b": jnp.arange(4, dtype=jnp.bfloat16)}
  places = {"a": jax.P("x", "y"), "b": jax.P("y")}
  sharded = {k: jax.device_put(v, jax.NamedSharding(mesh, places[k])) for k, v in tree.items()}
  want = checksums.checksums(tree)
  assert checksums.checksums(sharded) == want == checksums.checksums(jax.device_get(tree))
  words = np.asarray(tree["a"]).view(np.uint32)
  assert want["a"] == ["float32", int(words.sum(dtype=np.uint64) % 2**32)]


def test_another_optimizers_checkpoints_are_refused_and_left_alone(tmp_path):
  checkpointer = saved(tmp_path, (1, 2))
  other = init_state(tiny.tiny_params(), tiny.step_config(clip_grad=0.0).optim)
  with pytest.raises(UserError, match="another optimizer"):
    checkpointer.restore(None, abstract(other), new_iterator(), IDENTITY)
  checkpointer.close()
  assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]


def test_a_step_can_be_damaged_twice(tmp_path):
  saved(tmp_path, (1, 2)).close()
  for _ in range(2):
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    checkpointer = Checkpointer(tmp_path, max_to_keep=3)
    checkpointer.restore(None, abstract(new_state()), new_iterator(), IDENTITY)
    checkpointer.save(2, new_state(2), new_iterator(), {}, IDENTITY)
    checkpointer.close()
  names = {p.name for p in (tmp_path / "checkpoints").iterdir() if "damaged" in p.name}
  assert names == {"2.damaged", "2.damaged-1"}


def test_another_runs_damaged_checkpoint_stays_where_it_is(tmp_path):
  saved(tmp_path, (1, 2)).close()
  shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
  other = Checkpointer(tmp_path / "other", max_to_keep=1)
  arguments = (abstract(new_state()), new_iterator(), IDENTITY)
  state, path = other.restore_from(str(tmp_path), *arguments)
  assert path.name == "1" and checkpoint.steps(tmp_path / "checkpoints") == [1, 2]
  assert_same(state, new_state(1))


NUMBERS = {"x": jnp.arange(8.0)}


def save_numbers(workdir, steps=(1,), keep=3, run=None):
  """A small state at each step, after as many batches."""
  iterator = new_iterator()
  with contextlib.closing(Checkpointer(workdir, max_to_keep=keep)) as writer:
    for step in range(1, max(steps) + 1):
      next(iterator)
      if step in steps:
        state = {"x": NUMBERS["x"] * step}
        writer.save(step, state, iterator, {"seed": step}, IDENTITY, run=run)


def restore_numbers(workdir, **compared):
  reader = Checkpointer(workdir, max_to_keep=3)
  return reader.restore(None, abstract(NUMBERS), new_iterator(), IDENTITY, **compared)


@pytest.mark.parametrize("name", ["run[1]", "sweep[a]/run", "a\\b", "a**b", "a?", "\udcff"])
def test_a_workdir_that_could_not_be_read_again_is_refused_before_anything_is_written(
  tmp_path, name
):
  with pytest.raises(UserError, match="choose a --workdir without") as error:
    save_numbers(tmp_path / name)
  str(error.value).encode()  # it can be printed
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lr=1e-5, a b", "a]#%20", "a{b}:c", "日本", "a\nb"])
def test_other_names_of_a_workdir_are_saved_and_restored(tmp_path, name):
  save_numbers(tmp_path / name)
  assert_same(restore_numbers(tmp_path / name)[0], NUMBERS)


def test_a_checkpoint_moved_under_brackets_can_be_sampled_from(tmp_path):
  save_numbers(tmp_path / "plain")
  (tmp_path / "plain").rename(tmp_path / "run[1]")
  assert checkpoint.saved_record(tmp_path / "run[1]")["config"] == {"seed": 1}


@pytest.mark.parametrize("lost", ["state/manifest.ocdbt", "record/metadata"])
def test_a_save_that_cannot_be_opened_again_does_not_count_and_deletes_nothing(
  tmp_path, lost, monkeypatch
):
  save_numbers(tmp_path, (1,), keep=1)
  writer = Checkpointer(tmp_path, max_to_keep=1)
  writer.save(2, NUMBERS, new_iterator(), {}, IDENTITY)
  finish = writer._manager.wait_until_finished

  def loses_a_file():
    finish()
    (tmp_path / "checkpoints" / "2" / lost).unlink(missing_ok=True)

  monkeypatch.setattr(writer._manager, "wait_until_finished", loses_a_file)
  with pytest.raises(UserError, match="checkpoints/2 was written and cannot be opened again"):
    writer.wait()
  writer.close()
  assert_same(restore_numbers(tmp_path)[0], NUMBERS)


def _edit(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
  "file, old, new",
  [
    ("record/metadata", '"next_index": 2', '"next_index": 3'),
    ("record/metadata", '"seed": 2', '"seed": 7'),
  ],
)
def test_one_changed_digit_beside_the_arrays_sets_the_checkpoint_aside(tmp_path, file, old, new):
  save_numbers(tmp_path, (1, 2))
  _edit(tmp_path / "checkpoints" / "2" / file, old, new)
  state, step = restore_numbers(tmp_path)
  assert step == 1 and (tmp_path / "checkpoints" / "2.damaged").is_dir()
  assert_same(state, NUMBERS)


def _rewrite_record(workdir, step, change):
  path = workdir / "checkpoints" / str(step) / "record" / "metadata"
  record = json.loads(path.read_text())
  del record["crc"]
  change(record)
  path.write_text(json.dumps(record))


def test_a_position_that_no_iterator_has_is_damage(tmp_path):
  save_numbers(tmp_path, (1, 2))
  _rewrite_record(tmp_path, 2, lambda record: record.update(position={"next": "?"}))
  assert restore_numbers(tmp_path)[1] == 1


@pytest.mark.parametrize("count", [1, 4])
def test_a_checkpoint_of_an_earlier_release_has_its_position_in_a_file_a_process(tmp_path, count):
  save_numbers(tmp_path, (1, 2))
  _rewrite_record(tmp_path, 2, lambda record: record.pop("position"))
  (tmp_path / "checkpoints" / "2" / "data").mkdir()
  for i in range(count):
    file = tmp_path / "checkpoints" / "2" / "data" / f"process_{i}-of-{count}.json"
    file.write_text('{"next_index": 2}')
  iterator = new_iterator()
  reader = Checkpointer(tmp_path, max_to_keep=3)
  assert reader.restore(None, abstract(NUMBERS), iterator, IDENTITY)[1] == 2
  assert next(iterator) == 2


@pytest.mark.parametrize("other", ["", "no such file"])
def test_a_checkpoint_that_only_some_processes_can_read_is_an_error_and_stays(
  tmp_path, other, monkeypatch
):
  save_numbers(tmp_path, (1, 2))
  if not other:
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
  said = iter(["2 1", "", other])  # by another process: its steps, no error, what it read
  monkeypatch.setattr(processes, "gather", lambda text: [text, next(said)])
  with pytest.raises(UserError, match="checkpoints/2 cannot be read by process . of 2"):
    restore_numbers(tmp_path)
  assert (tmp_path / "checkpoints" / "2").is_dir() and not list(tmp_path.rglob("*.damaged"))


def test_what_does_not_belong_to_its_step_is_set_aside(tmp_path):
  save_numbers(tmp_path, (1, 2))

  def check(step, state, iterator):
    if float(state["x"][1]) != step or iterator.get_state() != {"next_index": step}:
      raise ValueError("of another step")

  assert restore_numbers(tmp_path, check=check)[1] == 2
  (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "5")
  assert restore_numbers(tmp_path, check=check)[1] == 1
  assert (tmp_path / "checkpoints" / "5.damaged").is_dir()


def test_odd_names_among_the_steps_are_left_alone(tmp_path):
  directory = tmp_path / "checkpoints"
  save_numbers(tmp_path, (1, 2))
  odd = ("²", "٣", "07", "x", "-4")
  for name in odd:
    (directory / name).mkdir()
  (directory / "9").write_text("a file")
  (directory / "13").symlink_to(tmp_path / "gone")
  assert checkpoint.steps(directory) == [1, 2]
  assert restore_numbers(tmp_path)[1] == 2
  save_numbers(tmp_path, (3,), keep=1)
  assert {p.name for p in directory.iterdir()} == {*odd, "9", "13", "3"}


def test_a_linked_checkpoint_is_read_and_never_deleted(tmp_path):
  save_numbers(tmp_path / "elsewhere", (1, 2))
  directory, target = tmp_path / "checkpoints", tmp_path / "elsewhere" / "checkpoints" / "2"
  directory.mkdir()
  (directory / "2").symlink_to(target)
  assert restore_numbers(tmp_path)[1] == 2
  save_numbers(tmp_path, (3,), keep=1)
  assert checkpoint.steps(directory) == [3] and target.is_dir()


def test_a_file_where_a_step_goes_is_an_error_that_names_it(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "checkpoints" / "1").write_text("mine")
  with pytest.raises(UserError, match="checkpoints/1"):
    save_numbers(tmp_path)
  assert (tmp_path / "checkpoints" / "1").read_text() == "mine"


def test_another_run_is_refused_by_what_differs_and_each_difference_can_be_allowed(tmp_path):
  save_numbers(tmp_path, run={"seed": 1, "data": "ab", "noise.kind": "block"})
  mine = {"seed": 2, "data": "cd", "noise.kind": "block"}
  both = r"data ab there, cd here; seed 1 there, 2 here.*allow_changes=\"\('data','seed',\)\""
  with pytest.raises(UserError, match=both):
    restore_numbers(tmp_path, run=mine)
  with pytest.raises(UserError, match=r"\(seed 1 there, 2 here\)"):
    restore_numbers(tmp_path, run=mine, allow=("data",))
  assert restore_numbers(tmp_path, run=mine, allow=("data", "seed"))[1] == 1
