"""`refine-jax`: its commands, what it says of a wrong one, and `refine-jax doctor`."""

import importlib
import importlib.metadata
import sys

import pytest
from packaging.requirements import Requirement

from refine_jax import commands, doctor


def call(monkeypatch, capsys, program, *arguments):
  """(exit status, standard output, standard error)."""
  monkeypatch.setattr(sys, "argv", ["program", *arguments])
  with pytest.raises(SystemExit) as end:
    program()
  said = capsys.readouterr()
  return end.value.code or 0, said.out, said.err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_is_there(name):
  module, _, function = commands.COMMANDS[name].place.partition(":")
  assert callable(getattr(importlib.import_module(module), function))


def test_the_list_of_commands(monkeypatch, capsys):
  for asked, status in (((), 2), (("--help",), 0), (("help",), 0)):
    code, printed, _ = call(monkeypatch, capsys, commands.main, *asked)
    assert code == status
    assert [line.split()[0] for line in printed.splitlines()[2:-2]] == list(commands.COMMANDS)


def test_a_wrong_command_is_one_line_with_the_nearest(monkeypatch, capsys):
  code, printed, errors = call(monkeypatch, capsys, commands.main, "trian", "--x")
  assert (code, printed) == (1, "") and errors.startswith("error: ") and errors.count("\n") == 1
  assert "'trian'" in errors and "'train'" in errors


def test_a_command_gets_its_arguments_and_its_name(monkeypatch, capsys):
  code, printed, _ = call(monkeypatch, capsys, commands.main, "export", "--help")
  assert code == 0 and printed.startswith("usage: refine-jax export ")
  code, _, errors = call(monkeypatch, capsys, commands.main, "train", "--workdri=x")
  assert code == 1 and "workdri" in errors


def test_the_doctor_tells_what_is_there(monkeypatch, capsys):
  code, printed, _ = call(monkeypatch, capsys, doctor.main)
  assert code == 0
  assert f"jax {importlib.metadata.version('jax')}," in printed
  assert "all that every command needs is there" in printed
  assert "x cpu, of cpu" in printed and "decoding xla" in printed


def test_the_doctor_names_what_is_missing_and_the_command_that_brings_it(monkeypatch, capsys):
  lines = ["jax>=999", "nowhere-at-all>=2", "numpy", "starlette>=1; extra == 'serve'"]
  monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
  monkeypatch.setattr(doctor, "__file__", "/site-packages/refine_jax/doctor.py")
  code, printed, _ = call(monkeypatch, capsys, doctor.main)
  assert code == 1 and "pip install 'jax>=999' 'nowhere-at-all>=2'" in printed
  assert f"jax is {importlib.metadata.version('jax')}, required is >=999" in printed
  assert "nowhere-at-all is not installed" in printed


def test_an_extra_of_a_package_counts_what_it_brings(monkeypatch):
  wanted = {"jax": ["nowhere>=1; extra == 'cuda'", "elsewhere; extra == 'tpu'"]}
  monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted.get(name))
  assert doctor.why_missing(Requirement("jax")) is None
  assert doctor.why_missing(Requirement("jax[cuda]")) == "nowhere is not installed"


def test_on_an_older_python_a_gpu_asks_for_another_environment(monkeypatch):
  monkeypatch.setattr(doctor.sys, "version_info", (3, 11, 7))
  assert "Python 3.12" in doctor.command("gpu", [])
  monkeypatch.setattr(doctor.sys, "version_info", (3, 12, 0))
  assert "pip install -e '.[gpu]'" in doctor.command("gpu", [])


@pytest.mark.parametrize("place", ["", "made", "no/such/place"])
def test_the_state_of_a_cache(place, tmp_path):
  (tmp_path / "made").mkdir()
  said = doctor.state_of(tmp_path / place if place else None)
  assert ("off" in said) == (not place) and ("not made yet" in said) == place.startswith("no")
