"""What the project says of its installation, and what a wrong start says."""

import configparser
import re
import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = ("refine_jax", "scripts", "benchmarks", "configs", "docs", "notebooks")
PROGRAMS = [
  p for p in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in p.read_text("utf-8")
]


def requirements(extra: str, python: str) -> list[Requirement]:
  """What the extra asks for on that Python."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg", encoding="utf-8")
  lines = parser["options.extras_require"][extra].splitlines()
  found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
  return [r for r in found if r.marker is None or r.marker.evaluate({"python_version": python})]


def test_the_gpu_extra_on_an_older_python_asks_for_a_name_that_says_why():
  (only,) = requirements("gpu", "3.11")
  assert "needs-Python-3.12" in only.url and only.url.startswith("file:///")
  assert not Path(only.url.removeprefix("file://")).exists()


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_the_gpu_extra_is_jax_where_there_is_one(python):
  (only,) = requirements("gpu", python)
  assert only.name == "jax" and only.extras == {"cuda13"} and only.url is None


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_plan_extra_has_what_compiles_for_each_kind_of_device(python):
  found = {r.name: r.extras for r in requirements("plan", python)}
  # By jax's own extras, which pin what goes with this jax.
  assert found == {"jax": {"tpu", "cuda13-local"}, "nvidia-cudnn-cu13": set()}


def test_every_command_that_installs_the_project_leaves_one_copy_of_it():
  files = [
    p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md", ".ipynb")
  ]
  for path in (ROOT / "README.md", *files):
    text = path.read_text(encoding="utf-8")
    for command in re.findall(r"pip install[^\n]*", text):
      if re.search(r"\.\[|refine_jax\[|install \.(\s|$)", command):
        assert re.search(r"install (-q )?(-e|--editable) ['\"]?\.", command), (path, command)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_a_benchmark_started_as_a_file_says_how(path):
  with pytest.raises(SystemExit, match=f"python -m benchmarks.{path.stem}"):
    runpy.run_path(str(path), run_name="__main__")
