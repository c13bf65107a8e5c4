"""Parquet files to tokenised examples on disk."""

import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import (
  BARE_TEMPLATE,
  data_config,
  load,
  make_tokenizer,
  message,
  targets,
  write_parquet,
)

from refine_jax.data import parquet, tokenize
from refine_jax.errors import UserError
from refine_jax.text import chat


@pytest.fixture
def numbers(tmp_path):
  return write_parquet(
    tmp_path / "a.parquet", [f"what is {i}" for i in range(25)], [f"it is {i}" for i in range(25)]
  )


def test_examples_are_prompt_response_and_eos(numbers):
  tokenizer = make_tokenizer()
  examples = load(numbers)
  assert len(examples) == 25
  prompt = chat.encode_prompt(tokenizer, "what is 7")
  response = [*chat.encode(tokenizer, ["it is 7"])[0], tokenizer.eos_token_id]
  assert examples.example(7).tolist() == prompt + response
  assert examples.prompt_lengths[7] == len(prompt)
  assert examples.lengths[7] == len(prompt + response)
  assert examples.source_rows.tolist() == [[0, i] for i in range(25)]


def test_messages_and_strings_give_the_same_examples(tmp_path, numbers):
  other = write_parquet(
    tmp_path / "b.parquet",
    [[message("user", f"what is {i}")] for i in range(25)],
    [[message("assistant", f"it is {i}")] for i in range(25)],
  )
  np.testing.assert_array_equal(load(numbers).tokens, load(other).tokens)


def test_other_columns_and_lists_of_files_and_globs(tmp_path):
  for name, row in (("b", 1), ("a", 0), ("c", 2)):
    table = pyarrow.table({"question": [f"q {row}"], "answer": [f"a {row}"], "id": [row]})
    pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
  keys = {"prompt_key": "question", "response_key": "answer"}
  answers = ["a 0<|end|>", "a 1<|end|>", "a 2<|end|>"]
  assert targets(load(f"{tmp_path}/*.parquet", **keys)) == answers
  files = f"{tmp_path}/c.parquet, {tmp_path}/[ab].parquet"
  examples = load(files, **keys)
  assert targets(examples) == [answers[2], *answers[:2]]
  assert examples.source_rows.tolist() == [[0, 0], [1, 0], [2, 0]]


def test_a_name_with_the_characters_of_a_glob_is_a_file(tmp_path):
  assert len(load(write_parquet(tmp_path / "a[1].parquet", ["a"], ["b"]))) == 1


def test_drops_are_counted_and_printed_by_reason(tmp_path, capsys):
  prompts = ["keep", None, "null", "blank", "eos", "the quick brown fox " * 30]
  file = write_parquet(tmp_path / "a.parquet", prompts, ["x", "y", None, " ", "<|end|>", "y"])
  examples = load(file)
  assert targets(examples) == ["x<|end|>"]
  assert examples.dropped == {"null": 2, "empty target": 2, "nothing left of the response": 1}
  printed = capsys.readouterr().out
  for reason, count in examples.dropped.items():
    assert f"dropped {count} ({reason})" in printed
  load(file)  # from the cache
  assert "dropped 2 (null)" in capsys.readouterr().out


def test_rows_of_other_types_and_empty_prompts_are_dropped(tmp_path):
  numbers = write_parquet(tmp_path / "a.parquet", ["a", "b"], [1, 2])
  with pytest.raises(UserError, match=r"No example is left of 2 rows.*not a string or messages"):
    load(numbers)
  empty = write_parquet(tmp_path / "b.parquet", ["", "b"], ["a", "b"])
  assert load(empty, make_tokenizer(BARE_TEMPLATE)).dropped == {"empty prompt": 1}


def test_text_that_is_not_utf8_drops_its_row_alone(tmp_path):
  cells = pyarrow.array([b"good", b"\xff\xfe", b"fine"])
  text = pyarrow.Array.from_buffers(pyarrow.string(), 3, cells.buffers())
  file = write_parquet(tmp_path / "a.parquet", ["a", "b", "c"], text)
  examples = load(file)
  assert targets(examples) == ["good<|end|>", "fine<|end|>"]
  assert examples.dropped == {"not a string or messages": 1}


def test_truncated_examples_are_counted_and_printed(tmp_path, capsys):
  file = write_parquet(tmp_path / "a.parquet", ["a", "b"], ["x", "the quick brown fox " * 30])
  examples = load(file)
  assert examples.truncated == 1 and examples.lengths.max() == 64
  assert "truncated 1 (right)" in capsys.readouterr().out


def test_truncation_error_names_file_and_row_across_row_groups(tmp_path):
  prompts, responses = ["a"] * 2500, ["x"] * 2500
  responses[2321] = "the quick brown fox " * 30
  file = write_parquet(tmp_path / "a.parquet", prompts, responses, row_group_size=700)
  with pytest.raises(UserError, match=re.escape(f"{file}, row 2321 (from 0): ")):
    load(file, truncation="error")
  cache = tokenize.cache_root(data_config())
  assert [p.suffix for p in cache.iterdir()] == [".lock"]  # nothing half-made stays


def test_source_rows_count_dropped_rows_and_all_row_groups(tmp_path):
  responses = [None if i % 3 else f"it is {i}" for i in range(2500)]
  file = write_parquet(tmp_path / "a.parquet", ["a"] * 2500, responses, row_group_size=700)
  examples = load(file)
  assert examples.source_rows[:, 1].tolist() == list(range(0, 2500, 3))
  assert targets(examples)[-1] == f"it is {examples.source_rows[-1, 1]}<|end|>"


@pytest.mark.parametrize("row_group_size", [1000, 20_000])
def test_reading_holds_a_small_part_of_the_file(tmp_path, row_group_size):
  """The file has twenty row groups of 1 MB, or one of 20 MB."""
  cells = [f"{i:010}" * 50 for i in range(20_000)]
  file = write_parquet(
    tmp_path / "a.parquet",
    cells,
    cells,
    row_group_size=row_group_size,
    compression="none",
    use_dictionary=False,
  )
  assert Path(file).stat().st_size > 20_000_000
  before, most, rows = pyarrow.total_allocated_bytes(), 0, 0
  for _, prompts, _ in parquet.batches(file, "prompt", "target"):
    most = max(most, pyarrow.total_allocated_bytes() - before)
    rows += len(prompts)
  assert rows == 20_000 and most < 8_000_000


def test_bad_files_are_the_users_error_and_say_which(tmp_path, numbers):
  damaged = tmp_path / "damaged.parquet"
  damaged.write_bytes(b"PAR1" + b"no" * 100)
  for files, message_ in [
    (f"{tmp_path}/missing.parquet", "No file matches '.*missing.parquet'"),
    (f"{tmp_path}/*.json", "No file matches"),
    (str(tmp_path), r"is a directory; name its files, as in .*/\*.parquet"),
    (" , ", "No file is named"),
    (f"{numbers},{damaged}", "damaged.parquet cannot be read as parquet"),
  ]:
    with pytest.raises(UserError, match=message_) as raised:
      load(files)
    assert "\n" not in str(raised.value)


def test_damage_behind_the_footer_names_the_file(tmp_path):
  file = Path(write_parquet(tmp_path / "a.parquet", ["abc"] * 100, ["def"] * 100))
  content = bytearray(file.read_bytes())
  content[4:60] = b"\xff" * 56
  file.write_bytes(content)
  with pytest.raises(UserError, match="a.parquet cannot be read as parquet"):
    load(str(file))


def test_a_missing_column_lists_those_there_before_any_work(tmp_path, numbers, capsys):
  other = tmp_path / "z.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["b"]}), other)
  expected = "z.parquet has no column 'target'; it has prompt, answer. Set config.data.response_key"
  with pytest.raises(UserError, match=expected):
    load(f"{numbers},{other}")
  assert "tokenising" not in capsys.readouterr().out


def test_a_tokenizer_without_eos_or_template_is_the_users_error(numbers):
  with pytest.raises(UserError, match="EOS"):
    load(numbers, make_tokenizer(eos=None))
  with pytest.raises(UserError, match="config.data.chat_template"):
    load(numbers, make_tokenizer(None))
  assert len(load(numbers, make_tokenizer(None), chat_template=BARE_TEMPLATE)) == 25
