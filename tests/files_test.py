"""Paths that users give, and files and directories that are complete or not there."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import data_config

from refine_jax import files, lock
from refine_jax.checkpoint import directory
from refine_jax.data import parquet, tokenize
from refine_jax.errors import UserError
from refine_jax.hf import export

# More than the kernel gives to a process, so that none has it.
DEAD = 2**22 + 1


@pytest.mark.parametrize(
  "value", ["gs://bucket/run", "s3://b", "hf://a/b", "file:///tmp/x", "gs:/b"]
)
def test_a_scheme_is_refused_by_its_name_and_option(value):
  with pytest.raises(UserError, match=rf"--output={value}.*{value.partition(':')[0]}://.*mount"):
    files.local_path(value, "--output")


@pytest.mark.parametrize(
  "value, said",
  [
    ("~nosuchuser/x", "no home directory of ~nosuchuser"),
    ("x" * 5000, "5000 characters. is too long"),
    ("a/" * 4000, "too long"),
    ("a\0b", "cannot be a path"),
    ("", "is empty"),
  ],
)
def test_a_name_that_no_file_can_have_is_one_short_line(value, said):
  with pytest.raises(UserError, match=said) as error:
    files.local_path(value, "--data")
  assert "--data" in str(error.value) and len(str(error.value)) < 200


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert files.local_path("~/runs/x", "--workdir") == tmp_path / "runs" / "x"
  assert files.local_path("a:b/c d", "--workdir").parts == ("a:b", "c d")


def test_a_new_file_appears_complete_or_not_at_all(tmp_path):
  path = tmp_path / "deep" / "a.json"
  with pytest.raises(ZeroDivisionError), files.new_file(path) as temporary:
    temporary.write_text("half")
    assert not path.exists()
    1 / 0  # noqa: B018
  assert not list(path.parent.iterdir())
  with files.new_file(path) as temporary:
    temporary.write_text("whole")
  assert path.read_text() == "whole" and len(list(path.parent.iterdir())) == 1


def test_a_new_directory_appears_complete_or_not_at_all(tmp_path):
  path = tmp_path / "model"
  path.mkdir()  # an empty one is as good as none
  with pytest.raises(ZeroDivisionError), files.new_directory(path) as temporary:
    (temporary / "a").write_text("half")
    1 / 0  # noqa: B018
  assert not list(path.iterdir())
  with files.new_directory(path) as temporary:
    (temporary / "b").mkdir()
    (temporary / "b" / "c").write_text("whole")
  assert (path / "b" / "c").read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_what_is_there_is_never_overwritten(tmp_path):
  (tmp_path / "a").write_text("mine")
  (tmp_path / "d").mkdir()
  (tmp_path / "d" / "a").write_text("mine")
  for name, new in (("a", files.new_file), ("a", files.new_directory), ("d", files.new_directory)):
    with pytest.raises(UserError, match="is not empty"), new(tmp_path / name):
      raise AssertionError("reached")
  late = tmp_path / "late"
  with pytest.raises(UserError, match="is not empty"), files.new_file(late) as temporary:
    temporary.write_text("ours")
    late.write_text("theirs")  # while we wrote
  assert late.read_text() == "theirs" and (tmp_path / "a").read_text() == "mine"


def test_left_overs_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
  dead, alive = tmp_path / f".out.{DEAD}.new", tmp_path / f".out.{os.getppid()}.new"
  others = tmp_path / f".other.{DEAD}.new"
  for path in (dead, alive, others):
    path.mkdir()
    (path / "x").write_text("")
  with files.new_directory(tmp_path / "out") as temporary:
    (temporary / "x").write_text("")
  assert {p.name for p in tmp_path.iterdir()} == {"out", alive.name, others.name}


def test_what_cannot_be_written_is_one_line_with_the_room_that_is_left(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file/out could not be written .*GiB are free there"):
    with files.new_directory(tmp_path / "file" / "out"):
      pass


_HOLDS = """
import sys, time
from pathlib import Path
from refine_jax import files, lock
with lock.lock(Path(sys.argv[1]), "it"):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_lock_names_its_holder_and_a_killed_process_lets_go(tmp_path):
  path = tmp_path / "lock"
  command = [sys.executable, "-c", _HOLDS, str(path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"it is in use by process {process.pid} on "):
      with lock.lock(path, "it"):
        pass
    process.kill()
    process.wait()
  with lock.lock(path, "it"):
    assert path.exists()
  assert not path.exists()


@pytest.mark.parametrize("gone", ["file", "directory", "replaced"])
def test_a_lock_that_was_removed_is_taken_again_and_said(tmp_path, gone):
  path = tmp_path / "run" / "lock"
  path.parent.mkdir()
  with lock.lock(path, "it") as held:
    assert held.keep()
    shutil.rmtree(path.parent) if gone == "directory" else path.unlink()
    if gone == "replaced":
      path.write_text("")
    assert not held.keep() and held.keep()
    with pytest.raises(lock.InUseError, match=f"it is in use by process {os.getpid()} on "):
      lock.Lock(path, "it")
  assert not path.exists()


def test_a_lock_whose_file_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
  def unlink(path):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

  with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
    patch.setattr(Path, "unlink", unlink)
    with lock.lock(tmp_path / "lock", "it"):
      raise ZeroDivisionError
  with lock.lock(tmp_path / "lock", "it"):
    pass


def test_a_lock_that_another_has_by_now_is_left_to_it(tmp_path):
  path = tmp_path / "lock"
  with lock.lock(path, "it") as held:
    path.unlink()
    other = lock.Lock(path, "it")
    with pytest.raises(lock.InUseError):
      held.keep()
  assert other.keep()
  other.release()


def _reads_data(value):
  parquet.expand(value, "config.data.train_files")


def _caches(value):
  tokenize.cache_root(data_config())


def _exports(value):
  export.export({}, "nowhere", value)


@pytest.mark.parametrize("use", [_reads_data, _caches, _exports, directory.resolve_resume_path])
@pytest.mark.parametrize("value", ["gs://bucket/x", "~nosuchuser/x", "x" * 5000])
def test_wherever_a_path_is_taken_the_rule_holds(use, value, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("REFINE_JAX_CACHE", value)
  with pytest.raises(UserError, match="not supported|no home directory|too long"):
    use(value)
  assert not list(tmp_path.iterdir())
