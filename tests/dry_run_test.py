"""--dry_run: what it says is what the run says, with an example; nothing is trained or written."""

import json
import sys

import pytest
import run_fixtures

from refine_jax.training import dry_run, train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  directory = tmp_path_factory.mktemp("dry")
  run_fixtures.make_data(directory)
  return directory


def lines_of(printed, *labels):
  return [line for line in printed.splitlines() if line.startswith(labels)]


SAID_BY_BOTH = (
  "devices ",
  "model ",
  "memory ",
  "compute ",
  "batch ",
  "steps ",
  "rounds ",
  "start ",
)


def test_it_says_what_the_run_says_and_leaves_nothing(place, monkeypatch):
  before = sorted(p for p in place.rglob("*") if "cache" not in p.parts)
  dry = run_fixtures.train(place, place / "work", "--dry_run")
  assert sorted(p for p in place.rglob("*") if "cache" not in p.parts) == before
  monkeypatch.setattr(train._Loop, "run", lambda *_: 0)
  real = run_fixtures.train(place, place / "work")
  assert len(lines_of(dry.stdout, *SAID_BY_BOTH)) == len(SAID_BY_BOTH)
  assert lines_of(dry.stdout, *SAID_BY_BOTH) == lines_of(real.stdout, *SAID_BY_BOTH)


def test_the_example_shows_its_response_and_its_noise(place):
  """Against the row that the data makes: the first one."""
  printed = run_fixtures.train(place, place / "other", "--dry_run").stdout
  (sample,) = lines_of(printed, "sample ")
  (clean,) = lines_of(printed, "t0 ")
  (noised,) = lines_of(printed, "s0 ")
  prompt, _, response = clean.partition("⟦")
  assert prompt.split()[1].startswith("<user>") and response.endswith("<eos>⟧")
  kept = noised.split("  ")[-2] if noised.endswith("noise)") else ""
  assert "▒<eos>" in kept + noised and "tokens of prompt" in sample


@pytest.mark.parametrize(
  "tty, variables, coloured", [(1, {}, 1), (0, {}, 0), (1, {"NO_COLOR": "1"}, 0)]
)
def test_colours_are_for_terminals_that_want_them(tty, variables, coloured, monkeypatch):
  monkeypatch.delenv("NO_COLOR", raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: bool(tty), raising=False)
  assert dry_run.styled("a", "response") == ("\x1b[32ma\x1b[0m" if coloured else "⟦a⟧")


def test_it_refuses_what_the_run_refuses(place):
  (place / "used").mkdir(exist_ok=True)
  (place / "used" / "thesis.txt").write_text("mine")
  said = run_fixtures.train(place, place / "used", "--dry_run", check=False)
  assert said.returncode == 1 and "is not of a run" in said.stderr
  said = run_fixtures.train(
    place, place / "w", "--dry_run", "--config.data.max_length=9999", check=False
  )
  assert said.returncode == 1 and "max_length" in said.stderr


def test_it_needs_no_workdir_and_reads_no_weights(place):
  """A base whose weights are not there is enough for an adapter's numbers."""
  model = place / "data" / "tiny" / "model"
  assert not list(model.glob("*.safetensors"))
  said = run_fixtures.train(
    place,
    "",
    "--dry_run",
    "--config.adapter.kind=gated",
    "--config.noise.kind=block",
    "--config.objective.num_iterations=1",
    "--config.objective.loss_weights=1",
    "--config.model.config=",
    f"--config.model.pretrained={model}",
  )
  width = json.loads((model / "config.json").read_text())["hidden_size"]
  assert "a new adapter on" in said.stdout and f", {width}], logits" in said.stdout
  assert "the base" in said.stdout
