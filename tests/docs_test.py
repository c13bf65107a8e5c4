"""The documentation: its commands, its links, its two languages, and its site."""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refine_jax.commands import COMMANDS
from refine_jax.config.describe import help_text
from refine_jax.config.key import all_keys
from refine_jax.config.schema import Config

ROOT = Path(__file__).parents[1]
PAGES = [
  *sorted((ROOT / "docs").glob("*.md")),
  *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "tests/README.md")),
]
# Doors that are no command of refine-jax, and where their command lines are read.
OTHERS = {
  "scripts/relabel.py": "scripts.relabel:main",
  "scripts/make_tiny_data.py": "scripts.make_tiny_data:main",
  "scripts/make_tasks.py": "scripts.make_tasks:main",
  "scripts/make_smollm2.py": "scripts.make_smollm2:main",
  "scripts/experiment_tasks.py": "scripts.experiment_tasks:main",
  "scripts/sample.py": COMMANDS["sample"].place,
  "scripts/export_hf.py": COMMANDS["export"].place,
  "refine_jax.lm_eval": COMMANDS["lm-eval"].place,
  "refine_jax.main": COMMANDS["train"].place,
  "refine_jax.serve": COMMANDS["serve"].place,
  "refine_jax.evaluate": COMMANDS["evaluate"].place,
  "refine_jax.plan": COMMANDS["plan"].place,
  "refine_jax.tune": COMMANDS["tune"].place,
}
TRAINS = {COMMANDS["train"].place, COMMANDS["plan"].place, OTHERS["scripts/experiment_tasks.py"]}
# The harness has its own command line, which it only reads with a task at hand.
UNREAD = {COMMANDS["lm-eval"].place}


def code_of(path: Path) -> list[str]:
  """The lines of a page's indented and fenced code, continued lines joined."""
  text = path.read_text(encoding="utf-8")
  lines = re.findall(r"^ {4}(.*)$|^(?:```\w*\n)((?:.|\n)*?)^```$", text, re.MULTILINE)
  code = "\n".join(indented or fenced for indented, fenced in lines)
  return re.sub(r"\\\n\s*", " ", code).split("\n")


def commands_of(path: Path) -> list[tuple[str, list[str]]]:
  """The project's own programs in a page's code: (module:function, arguments)."""
  found = []
  for line in code_of(path):
    try:
      words = shlex.split(line, comments=True)
    except ValueError:  # Python, or text that is no command
      continue
    words = [w for w in words if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    place = None
    if words[:1] == ["refine-jax"] and len(words) > 1 and words[1] in COMMANDS:
      place, words = COMMANDS[words[1]].place, words[2:]
    elif words[:2] == ["python", "-m"] and len(words) > 2:
      place, words = OTHERS.get(words[2]), words[3:]
    elif words[:1] == ["python"] and len(words) > 1:
      place, words = OTHERS.get(words[1]), words[2:]
    if place:
      found.append((place, words))
  return found


@pytest.fixture(scope="module")
def flags_of():
  """The flags that a program's --help lists."""
  known = {}

  def flags(place):
    if place not in known:
      module, _, name = place.partition(":")
      function = getattr(importlib.import_module(module), name)
      printed = io.StringIO()
      with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["program", "--help"])
        with pytest.raises(SystemExit):
          function()
      known[place] = set(re.findall(r"--(?:\[no\])?(\w+)", printed.getvalue()))
    return known[place]

  return flags


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_option_of_a_command_in_the_docs_is_there(path, flags_of):
  keys = {key.name for key in all_keys(Config)}
  keys |= {"optim.ema"} if path.name == "extending.md" else set()  # the key that it adds
  for place, words in commands_of(path):
    for word in words:
      name = word.removeprefix("--").partition("=")[0]
      if not word.startswith("--") or place in UNREAD:
        continue
      if name.startswith("config.") and place in TRAINS:
        assert name.removeprefix("config.") in keys, (path, word)
      else:
        assert name in flags_of(place), (path, place, word)


def test_the_commands_are_found():
  assert len(commands_of(ROOT / "docs" / "quickstart.md")) == 11
  assert len(commands_of(ROOT / "README.md")) == 4
  assert "--dry_run" in help_text()


def slug(heading: str) -> str:
  """GitHub's anchor of a heading."""
  text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
  return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors_of(path: Path) -> set[str]:
  text = re.sub(r"^```(?:.|\n)*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
  return {slug(h) for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path):
  text = path.read_text(encoding="utf-8")
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    file, _, anchor = target.partition("#")
    if re.match(r"\w+:", target):
      continue
    other = path if not file else (path.parent / file)
    assert other.exists(), (path, target)
    if anchor:
      assert anchor in anchors_of(other), (path, target)


@pytest.mark.parametrize("name", ["README{}.md", "docs/quickstart{}.md"])
def test_both_languages_have_the_same_commands_numbers_and_links(name):
  english, chinese = (ROOT / name.format(language) for language in ("", ".zh"))
  bare = [
    [line.partition("#")[0].split() for line in code_of(p) if line.strip()]
    for p in (english, chinese)
  ]
  assert bare[0] == bare[1]
  texts = [p.read_text(encoding="utf-8") for p in (english, chinese)]
  numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", t)) for t in texts]
  assert numbers[0] == numbers[1]
  targets = [
    sorted(
      x for x in re.findall(r"\]\(([^)#\s]+)", t) if "quickstart" not in x and "README" not in x
    )
    for t in texts
  ]
  assert targets[0] == targets[1]


def test_the_readme_is_short():
  for name in ("README.md", "README.zh.md"):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 120


def test_the_site_is_built_without_a_warning(tmp_path):
  pytest.importorskip("mkdocs")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
    cwd=ROOT,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
  for name in ("generate", "Options", "Engine", "compare_with_ar", "from_params", "svg"):
    assert f'.{name}"' in page, name


@pytest.mark.slow
def test_the_first_quarter_of_an_hour_word_for_word(tmp_path):
  """Its commands and its Python, in a copy of what a clone holds, with fewer steps."""
  for name in ("refine_jax", "configs", "scripts"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
  page = ROOT / "docs" / "quickstart.md"
  shims = tmp_path / "bin"
  shims.mkdir()
  for name, module in (("refine-jax", "-m refine_jax.commands"), ("python", "")):
    (shims / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
    (shims / name).chmod(0o755)
  variables = os.environ | {
    "PATH": f"{shims}:{os.environ['PATH']}",
    "PYTHONPATH": str(tmp_path),
    "JAX_PLATFORMS": "cpu",
    "REFINE_JAX_CACHE": str(tmp_path / "cache"),
  }
  ran, python = 0, []
  for line in code_of(page):
    if not line.startswith(("refine-jax", "python scripts")):
      if re.match(r"(import|model|out|print)\b", line):
        python.append(line)
      continue
    short = ""  # a model of so few steps does not know when to stop
    if line.startswith("refine-jax train"):
      short = " --config.optim.total_steps=20 --config.eval.eval_every=20"
    if line.startswith(("refine-jax sample", "refine-jax evaluate")):
      short = " --max_new_tokens=16"
    done = subprocess.run(
      ["bash", "-euc", line.partition("  #")[0] + short],
      cwd=tmp_path,
      env=variables,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    ran += 1
  assert ran == 11 and len(python) == 5
  done = subprocess.run(
    [sys.executable, "-c", "\n".join(python)],
    cwd=tmp_path,
    env=variables,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and "a pass" in done.stdout, done.stderr
