"""The notebook, run from its first cell to its last on a tiny model."""

import importlib.util
import os
from pathlib import Path

import pytest
import sampler_fixtures

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "refine_sampler.ipynb"


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_without_outputs(notebook):
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
  model = sampler_fixtures.text_model_directory(tmp_path)
  monkeypatch.setenv("REFINE_JAX_MODEL", str(model))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert not [o for o in outputs if o.output_type == "error"]
  printed = "".join(o.text for o in outputs if o.output_type == "stream")
  for words in (str(model), "passes", "ar  ", "exact  ", "n-gram", "threshold", "fixed", "sampled"):
    assert words in printed
  assert "answer 1: equal to ar" in printed
  shown = [o.data for o in outputs if "data" in o]
  assert any(len(data.get("image/png", "")) > 5000 for data in shown)
  page = shown[-1]["text/html"]
  assert page.count("<tr>") > 5 and 'class="t committed"' in page


def test_installing_needs_an_address(notebook, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  (source,) = (c.source for c in notebook.cells if c.source.startswith("#@title Install"))
  with pytest.raises(SystemExit, match="REPOSITORY"):
    exec(source, {})
  commands = []
  monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
  exec(source.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.com/x.git"'), {})
  (command,) = commands
  package, source = command[-2].split(" @ ")
  assert package.startswith("refine_jax") and source == "git+https://example.com/x.git"
