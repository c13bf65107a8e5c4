"""Command lines of any kind: parsed, or refused with a line, before a model is loaded."""

import io
import signal
import sys

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import fuzz, taken_or_refused
from hypothesis import strategies as st

from refine_jax.checkpoint import checkpointer
from refine_jax.decoding import loading
from refine_jax.errors import UserError
from refine_jax.evaluation import evaluate
from refine_jax.serving import command
from scripts import export_hf, sample

TEXTS = st.one_of(
  st.sampled_from(
    ["", "0", "-1", "1", "nan", "inf", "1e400", str(2**31), str(10**30), "9" * 5000, "0x1", "1_0"]
    + ["exact", "fixed", "branches", "bfloat16", "int8", "None", "{{", "%s", "a=b", "--model"]
    + ["~nosuchuser", "~", "x" * 5000, "a/" * 3000, "/dev/null", "/dev/stdin", "..", "."]
    + ["gs://bucket/x", "\x00", "\udcff", "\x1b[2J", "٣"]
  ),
  st.text(st.characters(exclude_characters="/"), max_size=6),  # --html makes its folder
  st.integers().map(str),
  st.floats().map(str),
)


def command_lines(required, options, switches=()):
  """Most with what is required, some without; options once or twice, and words that are none."""
  known = st.builds(lambda name, text: f"--{name}={text}", st.sampled_from(options), TEXTS)
  apart = st.builds(lambda name: f"--{name}", st.sampled_from([*options, *switches]))
  more = st.lists(known | apart | TEXTS, max_size=4)
  return st.builds(lambda first, rest: [*first, *rest], st.sampled_from([required, []]), more)


@pytest.fixture
def loaded(monkeypatch):
  """Stands in for reading weights: an error that ends the command."""

  def load(*_, **__):
    raise UserError("the weights would be read now")

  monkeypatch.setattr(loading, "load", load)
  monkeypatch.setattr(checkpointer, "restore_params", load)


def status_of(main, arguments, monkeypatch, capfd, given=b""):
  """Runs a command in this process: its exit status, after a look at what it said."""
  monkeypatch.setattr(sys, "argv", ["command", *arguments])
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
  end = taken_or_refused(main, refusals=(SystemExit,))
  said = capfd.readouterr().err
  assert end.code in (0, 1, 2)
  if end.code == 1:
    assert said.startswith("error: ") and said.count("\n") == 1 and said.strip().isprintable()
  if end.code == 2:  # argparse shows the usage before its line
    assert said.startswith("usage: ") and "\ncommand: error: " in said
  return end.code


SAMPLE = command_lines(
  ["--model=m", "--prompt=a"],
  ["model", "step", "dtype", "prompt", "prompts_file", "chat_template", "batch_size", "html"]
  + ["mode", "block_size", "max_new_tokens", "draft", "refine_iter", "tau", "temperature"]
  + ["top_k", "top_p", "seed", "stop"],
  ["chat", "jsonl", "check"],
)
EXPORT = command_lines(["--workdir=w", "--output=o"], ["workdir", "output", "step", "dtype"])


@fuzz(arguments=SAMPLE)
def test_sample_takes_a_command_line_or_says_why_not(
  arguments, loaded, monkeypatch, capfd, tmp_path
):
  monkeypatch.chdir(tmp_path)
  status_of(sample.main, arguments, monkeypatch, capfd)


@fuzz(
  given=st.binary(max_size=40) | st.text(max_size=20).map(lambda t: f'{{"prompt": {t}'.encode())
)
def test_sample_reads_any_prompts_or_says_why_not(given, loaded, monkeypatch, capfd):
  assert status_of(sample.main, ["--model=m"], monkeypatch, capfd, given) == 1


@fuzz(arguments=EXPORT)
def test_export_takes_a_command_line_or_says_why_not(
  arguments, loaded, monkeypatch, capfd, tmp_path
):
  monkeypatch.chdir(tmp_path)
  status_of(export_hf.main, arguments, monkeypatch, capfd)


EVALUATE = command_lines(
  ["--model=m", "--data=rows.parquet"],
  ["model", "data", "modes", "block_sizes", "scorer", "prompt_key", "max_new_tokens"]
  + ["batch_size", "limit", "dtype", "output"],
)


@fuzz(arguments=EVALUATE)
def test_evaluate_takes_a_command_line_or_says_why_not(
  arguments, loaded, monkeypatch, capfd, tmp_path
):
  rows = pyarrow.table({"prompt": ["a", "b"], "answer": ["1", "2"]})
  pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
  monkeypatch.chdir(tmp_path)
  status_of(evaluate.main, arguments, monkeypatch, capfd)


SERVE = command_lines(
  ["--model=m", "--port=0"],
  ["model", "step", "dtype", "chat_template", "name", "port", "api_key_file", "slots", "context"]
  + ["max_tokens", "queue", "body_bytes", "seconds", "grace", "trace_tokens", "mode"]
  + ["block_size", "draft", "refine_iter", "tau"],
)


@fuzz(arguments=SERVE)
def test_serve_takes_a_command_line_or_says_why_not(arguments, loaded, monkeypatch, capfd):
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  status_of(command.main, arguments, monkeypatch, capfd)


@pytest.mark.parametrize(
  ("main", "arguments"),
  [
    (sample.main, ["--model=m", "--prompt=a"]),
    (export_hf.main, ["--workdir=w", "--output=o"]),
  ],
)
def test_a_whole_command_line_reaches_the_weights(
  main, arguments, loaded, monkeypatch, capfd, tmp_path
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["command", *arguments])
  with pytest.raises(SystemExit):
    main()
  assert "would be read now" in capfd.readouterr().err
