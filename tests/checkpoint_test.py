"""Checkpoints: what is restored, what happens to damaged ones, and whose they are."""

import shutil

import grain
import jax
import numpy as np
import pytest
import train_fixtures as tiny

from refine_jax import checkpoint
from refine_jax.checkpoint import Checkpointer
from refine_jax.errors import UserError
from refine_jax.train_step import init_state

IDENTITY = {"width": 32}


def new_state(seed=0):
  recipe = tiny.recipe()
  return init_state(tiny.tiny_params(seed=seed), recipe.optim)


def new_iterator():
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(grain.MapDataset.source(list(range(100))).to_iter_dataset(options))


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


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
  assert checkpoint.saved_config(tmp_path) == {"seed": 3}
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


def _truncate(path):
  for file in path.rglob("*"):
    if file.is_file() and file.stat().st_size > 200:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
  "damage",
  [
    _truncate,
    lambda path: shutil.rmtree(path / "state"),
    lambda path: shutil.rmtree(path / "record"),
    lambda path: shutil.rmtree(path / "data"),
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


def test_a_disk_without_room_is_one_clear_error(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path, max_to_keep=1)
  manager = checkpointer._open()

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(manager, "save", full)
  with pytest.raises(UserError, match="could not be written .*No space left.*GiB are free"):
    checkpointer.save(1, new_state(), new_iterator(), {}, IDENTITY)
  monkeypatch.undo()
  checkpointer.close()
