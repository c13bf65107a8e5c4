"""A file relabelled by a model, against transformers' greedy answers."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from hf_fixtures import tiny_hf_model, words_tokenizer

from refine_jax.decoding import generation

SCRIPT = Path(__file__).parent.parent / "scripts" / "relabel.py"
ROWS = 7


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  directory, _ = tiny_hf_model("llama", tmp_path_factory.mktemp("relabel"))
  tokenizer = words_tokenizer()
  tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
  tokenizer.save_pretrained(directory)
  # Enough ends that most answers of a random model meet one soon.
  ends = {"eos_token_id": [1, *range(3, 9)]}
  (directory / "generation_config.json").write_text(json.dumps(ends))
  return directory


@pytest.fixture
def data(tmp_path):
  prompts = [f"w{i + 20} w{3 * i + 9} w{2 * i + 11}" for i in range(ROWS)]
  rows = [{"prompt": p, "target": "old", "answer": "none", "id": i} for i, p in enumerate(prompts)]
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, tmp_path / "train.parquet", row_group_size=3)
  return tmp_path / "train.parquet"


def run(monkeypatch, *arguments) -> int:
  monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--batch_size=4", *map(str, arguments)])
  with pytest.raises(SystemExit) as ended:
    runpy.run_path(str(SCRIPT), run_name="__main__")
  return ended.value.code or 0


def greedy(directory, prompt, limit):
  """The answer's text, and whether it ended."""
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  tokenizer = words_tokenizer()
  ids = torch.tensor([tokenizer.encode(prompt)])
  out = model.generate(ids, max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :].tolist()
  return tokenizer.decode(out, skip_special_tokens=True), out[-1] in [1, *range(3, 9)]


def test_responses_are_the_models_greedy_answers(directory, data, tmp_path, monkeypatch, capsys):
  output = tmp_path / "new.parquet"
  arguments = (f"--model={directory}", f"--data={data}", f"--output={output}")
  assert run(monkeypatch, *arguments, "--max_new_tokens=6") == 0
  old, new = (pyarrow.parquet.read_table(p).to_pylist() for p in (data, output))
  ended = 0
  for before, after in zip(old, new, strict=True):
    text, stopped = greedy(directory, before["prompt"], 6)
    ended += stopped
    assert after == before | {"target": text if stopped else "old"}
  assert 0 < ended < ROWS
  printed = capsys.readouterr().out
  assert f"{ended} relabelled" in printed and f"{ROWS - ended} kept: no end" in printed
  # Again: refused, and nothing changed.
  written = output.read_bytes()
  assert run(monkeypatch, *arguments) == 1
  assert "exists" in capsys.readouterr().err and output.read_bytes() == written


def test_wrong_answers_leave_the_response(directory, data, tmp_path, monkeypatch, capsys):
  output = tmp_path / "new.parquet"
  arguments = (f"--model={directory}", f"--data={data}", f"--output={output}", "--scorer=exact")
  assert run(monkeypatch, *arguments, "--max_new_tokens=6") == 0
  assert "kept: wrong answer" in capsys.readouterr().out
  assert {row["target"] for row in pyarrow.parquet.read_table(output).to_pylist()} == {"old"}


def test_a_missing_column_or_file_is_one_line(directory, data, tmp_path, monkeypatch, capsys):
  output = tmp_path / "new.parquet"
  common = (f"--model={directory}", f"--output={output}")
  assert run(monkeypatch, *common, f"--data={data}", "--response_key=reply") == 1
  assert "no column 'reply'; it has prompt, target" in capsys.readouterr().err
  assert run(monkeypatch, *common, f"--data={tmp_path / 'gone.parquet'}") == 1
  assert "gone.parquet" in capsys.readouterr().err and not output.exists()


def test_a_column_without_a_response_is_filled_in_and_prompts_are_never_written_over(
  directory, data, tmp_path, monkeypatch, capsys
):
  table = pyarrow.parquet.read_table(data)
  index = table.schema.get_field_index("target")
  table = table.set_column(index, "target", pyarrow.nulls(ROWS))
  pyarrow.parquet.write_table(table, data)
  output = tmp_path / "new.parquet"
  arguments = (f"--model={directory}", f"--data={data}", f"--output={output}")
  assert run(monkeypatch, *arguments, "--response_key=prompt") == 1
  assert "are both 'prompt'" in capsys.readouterr().err and not output.exists()
  assert run(monkeypatch, *arguments, "--max_new_tokens=6") == 0
  new = pyarrow.parquet.read_table(output)
  assert new.schema.field("target").type == pyarrow.string()
  assert ROWS > new["target"].null_count and new["prompt"] == table["prompt"]


def test_a_row_whose_logits_are_not_finite_keeps_its_response_and_is_named(
  directory, data, tmp_path, monkeypatch, capsys
):
  attempt, output = generation.attempt, tmp_path / "new.parquet"

  def failing_in_one(*arguments, **options):
    return dataclasses.replace(attempt(*arguments, **options), not_finite=[2])

  monkeypatch.setattr(generation, "attempt", failing_in_one)
  arguments = (f"--model={directory}", f"--data={data}", f"--output={output}")
  assert run(monkeypatch, *arguments, "--max_new_tokens=6") == 0
  said = capsys.readouterr()
  assert f"row 2 (from 0): {generation.NOT_FINITE}" in said.err
  assert "1 kept: cannot be answered" in said.out
  targets = pyarrow.parquet.read_table(output)["target"].to_pylist()
  assert targets[2] == "old" and targets.count("old") < ROWS


def test_rows_that_cannot_be_answered_keep_their_response_and_are_named(
  directory, data, tmp_path, monkeypatch, capsys
):
  rows = pyarrow.parquet.read_table(data).to_pylist()
  rows[1]["prompt"], rows[5]["prompt"] = None, "w9 " * 400
  table = pyarrow.Table.from_pylist(rows)
  index = table.schema.get_field_index("target")
  table = table.set_column(index, "target", table["target"].dictionary_encode())
  pyarrow.parquet.write_table(table, data)
  output = tmp_path / "new.parquet"
  arguments = (f"--model={directory}", f"--data={data}", f"--output={output}")
  assert run(monkeypatch, *arguments, "--max_new_tokens=6") == 0
  said = capsys.readouterr()
  new = pyarrow.parquet.read_table(output).to_pylist()
  assert [row | {"target": ""} for row in new] == [row | {"target": ""} for row in rows]
  assert new[1]["target"] == new[5]["target"] == "old" != new[0]["target"]
  assert "2 kept: cannot be answered" in said.out
  assert (
    f"kept: {data}, row 1 (from 0)" in said.err and "row 5 (from 0): The prompt has" in said.err
  )
