"""Bad rows never end a run: counted, named, dropped. Files in every shape: read or one line."""

import datetime
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers
from data_fixtures import (
  CHAT_TEMPLATE,
  EOS,
  data_config,
  load,
  make_tokenizer,
  message,
  targets,
  write_parquet,
)

from refine_jax.data import parquet, tokenize
from refine_jax.errors import UserError


def write_lines(path, rows):
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return str(path)


def test_json_lines_give_the_examples_of_parquet(tmp_path):
  prompts, responses = [f"what is {i}" for i in range(2500)], [f"it is {i}" for i in range(2500)]
  rows = [{"prompt": p, "target": r} for p, r in zip(prompts, responses, strict=True)]
  ours = load(write_lines(tmp_path / "a.jsonl", rows))
  theirs = load(write_parquet(tmp_path / "a.parquet", prompts, responses))
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)
  np.testing.assert_array_equal(ours.source_rows, theirs.source_rows)


def test_bad_lines_of_every_kind_drop_themselves_alone_and_are_named(tmp_path, capsys):
  bad = {
    b"null": "not a string or messages",
    b"3": "not a string or messages",
    b"{not json": "not a string or messages",
    b"\xff\xfe": "not a string or messages",
    b"[" * 100_000: "not a string or messages",
    b'{"prompt": "a"}': "null",
    b'{"target": "a"}': "null",
    b'{"prompt": "a", "target": "\\ud800"}': "not valid Unicode",
    b'{"prompt": "\\ud800", "target": "a"}': "not valid Unicode",
    b'{"prompt": "a", "target": " "}': "empty target",
    b'{"prompt": {"a": 1}, "target": "a"}': "not a string or messages",
    b'{"prompt": [{"role": "user", "content": 3}], "target": "a"}': "not a string or messages",
  }
  good = b'{"prompt": "a", "target": "x"}'
  (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, b"", *bad, good]))
  examples = load(str(tmp_path / "a.jsonl"))
  assert targets(examples) == ["x" + EOS] * 2
  assert examples.source_rows[:, 1].tolist() == [0, len(bad) + 1]
  reasons = list(bad.values())
  assert examples.dropped == {reason: reasons.count(reason) for reason in reasons}
  printed = capsys.readouterr().out
  assert f"null: {tmp_path}/a.jsonl row 6, {tmp_path}/a.jsonl row 7" in printed


def test_too_many_bad_rows_are_the_users_error_and_name_some(tmp_path):
  rows = [{"prompt": "a", "target": "x" if i < 2 else None} for i in range(30)]
  file = write_lines(tmp_path / "a.jsonl", rows)
  with pytest.raises(UserError, match=r"Only 2 examples are left of 30 rows.*a.jsonl row 2"):
    load(file)
  assert len(load(write_lines(tmp_path / "b.jsonl", rows[:20]))) == 2  # nine of ten are bad


def test_rows_cut_away_by_truncation_are_not_bad(tmp_path):
  rows = [{"prompt": "a" if i < 1 else "b " * 90, "target": "x"} for i in range(30)]
  assert len(load(write_lines(tmp_path / "a.jsonl", rows))) == 1


def test_reasons_are_bounded_where_each_row_has_its_own(tmp_path):
  template = (
    "{% if messages[0].content != 'good' %}{{ raise_exception(messages[0].content * 999) }}"
    "{% endif %}a"
  )
  rows = [{"prompt": p, "target": "x"} for p in ["good"] * 50 + [f"bad {i}" for i in range(100)]]
  examples = load(write_lines(tmp_path / "a.jsonl", rows), make_tokenizer(template))
  assert len(examples) == 50 and sum(examples.dropped.values()) == 100
  assert len(examples.dropped) <= 21 and max(map(len, examples.dropped)) < 300


def test_a_row_that_the_tokenizer_fails_on_drops_itself_alone(tmp_path):
  """This one has no token for unknown words, and its library then raises a bare Exception."""
  words = {word: i for i, word in enumerate(["<|end|>", "user", "assistant", "a", "x"])}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)
  tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
  examples = load(
    write_parquet(tmp_path / "a.parquet", ["a", "b", "a"], ["x", "x", "x"]), tokenizer
  )
  assert examples.source_rows[:, 1].tolist() == [0, 2]
  (reason,) = examples.dropped
  assert reason.startswith("The tokenizer fails: ")


def test_a_json_array_says_how_to_write_it(tmp_path):
  (tmp_path / "a.json").write_text('[{"prompt": "a", "target": "b"}]')
  with pytest.raises(UserError, match="a.json is a JSON array; write an object a line"):
    load(str(tmp_path / "a.json"))


def test_json_lines_in_utf_16_are_refused_as_a_whole(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"prompt": "a", "target": "b"}\n' * 3, encoding="utf-16")
  with pytest.raises(UserError, match="a.jsonl is not UTF-8 but UTF-16"):
    load(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(UserError, match="is a pipe or a device"):
    parquet.columns(tmp_path / name)
  with pytest.raises(UserError, match="is a pipe or a device"):
    next(parquet.batches(tmp_path / name, "prompt", "target"))


def test_a_column_that_is_missing_in_json_lines_lists_those_there(tmp_path):
  file = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}])
  with pytest.raises(UserError, match="no column 'target'; it has prompt, answer. Set config.data"):
    load(file)


def test_a_changed_json_line_is_tokenised_again_though_size_and_time_are_the_same(tmp_path):
  path = tmp_path / "a.jsonl"
  rows = [{"prompt": "a", "target": "x" * 50} for _ in range(2000)]
  write_lines(path, rows)
  before = path.stat().st_mtime_ns
  load(str(path))
  write_lines(path, [{"prompt": "a", "target": "y" * 50}, *rows[1:]])
  os.utime(path, ns=(before, before))
  assert targets(load(str(path)))[0] == "y" * 50 + EOS


def test_a_column_that_is_there_twice_is_the_users_error(tmp_path):
  table = pyarrow.Table.from_arrays([["a"], ["b"], ["c"]], names=["prompt", "prompt", "target"])
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(UserError, match="a.parquet has 2 columns 'prompt'"):
    load(str(tmp_path / "a.parquet"))


def test_files_of_different_columns_and_types_are_read_together(tmp_path):
  first = write_parquet(tmp_path / "a.parquet", ["a"], ["x"])
  table = pyarrow.table(
    {
      "id": [1],
      "target": pyarrow.array(["y"]).dictionary_encode(),
      "prompt": [[message("user", "a")]],
    }
  )
  pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
  lines = write_lines(tmp_path / "c.jsonl", [{"more": 1, "target": "z", "prompt": "a"}])
  examples = load(f"{first},{tmp_path}/b.parquet,{lines}")
  assert targets(examples) == ["x" + EOS, "y" + EOS, "z" + EOS]


@pytest.mark.parametrize(
  "name",
  ["x" * 5000, "d/" * 3000, "~nosuchuser/a.parquet", "a\0b", "\ud800", "*" * 5000, "[", "**/no*"],
)
def test_names_that_cannot_be_files_are_one_short_line(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="config.data.train_files") as raised:
    parquet.expand(name, "config.data.train_files")
  assert len(str(raised.value)) < 500


def test_wide_files_do_not_make_long_messages(tmp_path):
  table = pyarrow.table({f"column_{i}": [1] for i in range(3000)})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(UserError, match="has no column 'prompt'") as raised:
    load(str(tmp_path / "a.parquet"))
  assert len(str(raised.value)) < 500


class _Tomorrow(datetime.date):
  @classmethod
  def today(cls):
    return datetime.date(2030, 1, 1)


@pytest.mark.parametrize("dated", [False, True])
def test_a_template_that_prints_the_date_shares_no_entry_across_days(tmp_path, monkeypatch, dated):
  template = CHAT_TEMPLATE + ("{{ strftime_now('%d %b %Y') }}" if dated else "")
  files = parquet.expand(write_parquet(tmp_path / "a.parquet", ["a"], ["x"]), "")
  for tokenizer, data in (
    (make_tokenizer(template), data_config()),
    (make_tokenizer(None), data_config(chat_template=template)),
  ):
    today = tokenize.fingerprint(files, data, tokenizer)
    with monkeypatch.context() as patch:
      patch.setattr(tokenize.datetime, "date", _Tomorrow)
      assert (tokenize.fingerprint(files, data, tokenizer) != today) == dated
