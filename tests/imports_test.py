"""The package's one direction of imports, read from its sources, as a table of folders."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "refine_jax"

# A folder (or a module next to them) -> the folders that it may import from, itself included.
_LEAVES = {"errors", "tree", "files", "records", "quoting"}
MAY_IMPORT = {
  "errors": set(),
  "batch": set(),
  "compile_cache": set(),
  "tree": set(),
  "quoting": set(),
  "target": set(),
  "files": {"errors", "quoting"},
  "records": {"files"},
  "cli": {"errors", "files", "quoting"},
  "interrupt": set(),
  "lock": {"errors", "files"},
  "processes": {"errors"},
  "distributed": {"cli", "errors", "quoting"},
  "config": _LEAVES,
  "sharding": _LEAVES | {"batch", "config"},
  "text": _LEAVES,
  "model": {"batch", "sharding", "target"},
  "checkpoint": _LEAVES | {"processes"},
  "attention": {"batch", "errors", "model", "sharding", "target"},
  "objective": {"batch", "config", "errors"},
  "data": _LEAVES | {"batch", "config", "text"},
  "hf": _LEAVES | {"model", "objective", "processes", "text"},
  "decoding": _LEAVES
  | {"attention", "batch", "checkpoint", "compile_cache", "hf", "interrupt", "model"}
  | {"sharding", "target", "text"},
  "evaluation": _LEAVES | {"cli", "data", "decoding", "hf", "model", "text"},
  "terminal": _LEAVES | {"cli", "decoding", "hf", "interrupt"},
  "serving": _LEAVES | {"cli", "decoding", "hf", "text"},
  "training": _LEAVES
  | {
    "attention",
    "batch",
    "checkpoint",
    "compile_cache",
    "config",
    "data",
    "decoding",
    "evaluation",
    "hf",
    "interrupt",
    "lock",
  }
  | {"model", "objective", "processes", "sharding", "target", "text"},
  "planning": _LEAVES
  | {"attention", "batch", "cli", "config", "decoding", "hf", "model", "objective", "sharding"}
  | {"target", "training"},
}
DOORS = {
  "main",
  "commands",
  "convert_config",
  "doctor",
  "evaluate",
  "export",
  "lm_eval",
  "plan",
  "sample",
  "serve",
  "tune",
  "__init__",
}


class _DropTypeImports(ast.NodeTransformer):
  """Leaves out what only type checkers read: `if TYPE_CHECKING:`."""

  def visit_If(self, node: ast.If) -> ast.AST | None:
    return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


@functools.cache
def imports(path: Path, *, types: bool = True) -> frozenset[str]:
  """Every module that a file names in an import, functions' own imports included.

  Args:
    types: whether imports count that are never run, for annotations alone.
  """
  found = set()
  tree = ast.parse(path.read_text(encoding="utf-8"))
  for node in ast.walk(tree if types else _DropTypeImports().visit(tree)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return frozenset(found)


def folder_of(path: Path) -> str:
  relative = path.relative_to(PACKAGE)
  return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def module_name(path: Path) -> str:
  parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("folder", sorted({folder_of(p) for p in PACKAGE.rglob("*.py")} - DOORS))
def test_a_folder_imports_only_what_the_table_allows(folder):
  assert folder in MAY_IMPORT, f"{folder} is new: say in MAY_IMPORT what it may import."
  names = {p.name.removesuffix(".py") for p in PACKAGE.iterdir()}
  for path in (p for p in PACKAGE.rglob("*.py") if folder_of(p) == folder):
    used = {m.split(".")[1] for m in imports(path) if m.startswith("refine_jax.")} & names
    assert used <= MAY_IMPORT[folder] | {folder}, path


def test_no_module_is_reached_from_what_it_imports():
  files = {module_name(p): p for p in PACKAGE.rglob("*.py")}
  # A folder's __init__ is run before any module of it, and is no import of theirs.
  edges = {
    name: {m for m in imports(p, types=False) if m in files and not f"{name}.".startswith(f"{m}.")}
    for name, p in files.items()
  }
  done = set()

  def visit(name, path=()):
    assert name not in path, " -> ".join((*path, name))
    if name not in done:
      for other in sorted(edges[name]):
        visit(other, (*path, name))
      done.add(name)

  for name in edges:
    visit(name)


def naming(prefix: str) -> set[str]:
  """Files, by their path in the package, that import something under this prefix."""
  return {
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if any(f == prefix or f.startswith(prefix + ".") for f in imports(path))
  }


def test_libraries_stay_behind_their_one_module():
  assert naming("flax.linen") == {"model/layer.py", "model/transformer.py"}
  assert naming("orbax") == {"checkpoint/checkpointer.py"}
  # Not ours to import: files that exports hold, for transformers to run.
  assert naming("torch") == {f"hf/custom_generate/{name}.py" for name in ("generate", "passes")}


def test_data_and_text_know_no_jax():
  assert not [name for name in naming("jax") if name.startswith(("data/", "text/"))]


def test_generating_loads_no_library_of_training():
  code = (
    "import refine_jax, sys; refine_jax.generate;"
    "print([m for m in ('grain', 'pyarrow', 'orbax', 'optax') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done.stderr


def test_no_file_is_long():
  for path in PACKAGE.rglob("*.py"):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path


def test_the_page_of_tests_names_every_file():
  here = Path(__file__).parent
  words = set(re.findall(r"\w+", (here / "README.md").read_text(encoding="utf-8")))
  names = {p.name.removesuffix("_test.py") for p in here.glob("*_test.py")}
  assert sorted(names - words - {n for n in names if n.endswith("_fuzz")}) == []
