"""Annotations are complete; basedpyright (scripts/test.sh) says whether they are true."""

import ast
import dataclasses
import importlib
import inspect
import typing
from pathlib import Path

import refine_jax
from refine_jax.decoding import generation
from refine_jax.decoding.options import Options

PACKAGE = Path(refine_jax.__file__).parent


def public_functions(
  body: list[ast.stmt], owner: str = ""
) -> typing.Iterator[tuple[str, typing.Any]]:
  """(qualified name, definition) of functions and methods; not of those inside functions."""
  for node in body:
    public = (
      not getattr(node, "name", "_").startswith("_") or getattr(node, "name", "")[-2:] == "__"
    )
    if isinstance(node, ast.ClassDef) and public:
      yield from public_functions(node.body, f"{node.name}.")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and public:
      yield owner + node.name, node


def lacking(definition: ast.FunctionDef, *, method: bool) -> list[str]:
  """The arguments without an annotation, and "return" where that has none."""
  a = definition.args
  arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
  if method and arguments and arguments[0].arg in ("self", "cls"):
    del arguments[0]
  names = [x.arg for x in arguments if x.annotation is None]
  return names + ["return"] * (definition.returns is None)


def test_a_function_without_annotations_is_found():
  module = ast.parse("class A:\n  def f(self, x, *y: int, z=1) -> int: ...\ndef _g(x): ...")
  [(name, definition)] = public_functions(module.body)
  assert (name, lacking(definition, method=True)) == ("A.f", ["x", "z"])


def test_every_public_function_is_fully_annotated():
  found = {
    (path.relative_to(PACKAGE).as_posix(), name): names
    for path in sorted(PACKAGE.rglob("*.py"))
    for name, definition in public_functions(ast.parse(path.read_text(encoding="utf-8")).body)
    if (names := lacking(definition, method="." in name))
  }
  assert not found


def test_editors_see_what_the_package_loads_when_it_is_used():
  tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
  [block] = [node for node in tree.body if isinstance(node, ast.If)]
  shown = {f"{node.module}.{x.name}" for node in block.body for x in node.names}
  assert shown == {f"refine_jax.{module}.{name}" for name, module in refine_jax._WHERE.items()}
  assert set(refine_jax.__all__) == refine_jax._WHERE.keys() | {"__version__"}
  for name, module in refine_jax._WHERE.items():
    home = importlib.import_module(f"refine_jax.{module}")
    assert getattr(refine_jax, name) is getattr(home, name)


def test_help_shows_every_option_of_generate():
  parameters = inspect.signature(generation.generate).parameters.keys()
  assert {field.name for field in dataclasses.fields(Options)} == parameters - {
    "model",
    "prompts",
    "slots",
    "stream",
  }


def test_the_package_says_that_it_is_typed():
  assert (PACKAGE / "py.typed").is_file()
