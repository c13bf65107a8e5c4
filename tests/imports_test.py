"""The modules' one direction, read from their sources."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "refine_jax"


def imports(path: Path) -> set[str]:
  """Every module that a file names in an import, functions' own imports included."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def graph() -> dict[str, set[str]]:
  names = {p.stem if p.parent == PACKAGE else "data": p for p in PACKAGE.rglob("*.py")}
  names.pop("__init__", None)
  result: dict[str, set[str]] = {}
  for path in PACKAGE.rglob("*.py"):
    name = "data" if path.parent.name == "data" else path.stem
    if name == "__init__":
      continue
    own = {m.split(".")[1] for m in imports(path) if m.startswith("refine_jax.")}
    result.setdefault(name, set()).update(own - {name})
  return {name: own & result.keys() for name, own in result.items()}


def test_no_module_is_reached_from_what_it_imports():
  edges, order = graph(), []

  def visit(name, path=()):
    assert name not in path, " -> ".join((*path, name))
    for other in sorted(edges[name]):
      visit(other, (*path, name))
    order.append(name)

  for name in edges:
    visit(name)


def test_libraries_stay_behind_their_one_module():
  users = {path.stem: imports(path) for path in PACKAGE.rglob("*.py")}

  def naming(prefix):
    return {name for name, found in users.items() if any(f.startswith(prefix) for f in found)}

  assert naming("flax.linen") == {"model"}
  assert naming("orbax") == {"checkpoint"}
  assert not naming("torch")


def test_the_objective_knows_no_model_and_data_knows_no_jax():
  edges = graph()
  assert edges["objective"] == {"noise"} and edges["noise"] == {"config"}
  assert edges["data"] <= {"config", "errors"}
  assert not any(m.split(".")[0] == "jax" for p in (PACKAGE / "data").glob("*.py")
                 for m in imports(p))  # fmt: skip


def test_no_file_is_long():
  for path in PACKAGE.rglob("*.py"):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path
