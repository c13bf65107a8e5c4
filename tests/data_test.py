"""Parquet files to tokenised examples on disk."""

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import BARE_TEMPLATE, data_config, make_tokenizer, message, write_parquet

from refine_jax.data import chat, load_examples, parquet, store, tokenize
from refine_jax.errors import UserError


def load(files, tokenizer=None, **changes):
  return load_examples(files, data_config(**changes), tokenizer or make_tokenizer(), name="train")


def targets(examples, tokenizer=None) -> list[str]:
  tokenizer = tokenizer or make_tokenizer()
  spans = zip(map(examples.example, range(len(examples))), examples.prompt_lengths, strict=True)
  return [tokenizer.decode(ids[start:]) for ids, start in spans]


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
  """Of twenty row groups of 1 MB, and of one of 20 MB."""
  cells = [f"{i:010}" * 50 for i in range(20_000)]
  file = write_parquet(
    tmp_path / "a.parquet", cells, cells, row_group_size=row_group_size, compression="none",
    use_dictionary=False,
  )  # fmt: skip
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


def test_a_second_start_reads_the_cache(numbers, monkeypatch, capsys):
  first = load(numbers)
  monkeypatch.setattr(tokenize, "_tokenise", None)
  second = load(numbers)
  assert "read from" in capsys.readouterr().out.splitlines()[-1]
  for name, _, _ in store._ARRAYS:
    np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
  assert isinstance(second.tokens, np.memmap)


def test_fingerprint_covers_what_decides_the_tokens(tmp_path, numbers):
  def name(files=(numbers,), tokenizer=None, **changes):
    tokenizer = tokenizer or make_tokenizer()
    return tokenize.fingerprint(list(map(Path, files)), data_config(**changes), tokenizer)

  other = write_parquet(tmp_path / "b.parquet", ["a"], ["b"])
  bos = make_tokenizer()
  bos.bos_token = "<|start|>"
  added = make_tokenizer()
  added.add_tokens(["quick"])
  names = [
    name(), name(max_length=32), name(truncation="left"), name(response_key="prompt"),
    name([other]), name([numbers, other]), name([other, numbers]), name(tokenizer=bos),
    name(tokenizer=added), name(tokenizer=make_tokenizer(BARE_TEMPLATE)),
    name(tokenizer=make_tokenizer(None), chat_template="a"),
    name(tokenizer=make_tokenizer(None), chat_template="b"),
  ]  # fmt: skip
  assert len(set(names)) == len(names)
  used = make_tokenizer()
  used(["a", "b c"], padding=True, truncation=True, max_length=4)
  assert name(tokenizer=used) == name(pack=False) == name(chat_template="unused") == names[0]


def test_a_rewritten_file_is_tokenised_again(tmp_path, numbers):
  assert len(load(numbers)) == 25
  write_parquet(numbers, ["a"], ["new"])
  assert targets(load(numbers)) == ["new<|end|>"]


def _entry() -> Path:
  (entry,) = (p for p in tokenize.cache_root(data_config()).iterdir() if p.is_dir())
  return entry


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  "damage",
  [
    lambda entry: (entry / "tokens.bin").unlink(),
    lambda entry: (entry / "stats.json").unlink(),
    lambda entry: (entry / "stats.json").write_text("[]"),
    lambda entry: (entry / "stats.json").write_text('{"examples": 25, "tokens": "many"}'),
    lambda entry: (entry / "offsets.bin").write_bytes(b""),
    lambda entry: _flip(entry / "tokens.bin"),
    lambda entry: _flip(entry / "prompt_lengths.bin"),
    lambda entry: (entry.rename(entry.with_suffix(".x")), entry.write_text("a file")),
  ],
)
def test_a_damaged_cache_is_made_again(numbers, damage, capsys):
  tokens = load(numbers).tokens.copy()
  damage(_entry())
  np.testing.assert_array_equal(load(numbers).tokens, tokens)
  assert "is damaged; it is made again" in capsys.readouterr().out
  load(numbers)
  assert "read from" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_that_was_killed_leaves_nothing_in_the_way(numbers, monkeypatch):
  def killed(writer, *_):
    writer.append([[1, 2]], [1], [(0, 0)])
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tokenize, "_tokenise", killed)
    with pytest.raises(KeyboardInterrupt):
      load(numbers)
  assert len(load(numbers)) == 25


def _load_and_report(files, queue):
  queue.put(load(files).tokens.tolist())


def test_runs_at_the_same_time_agree_and_one_of_them_works(tmp_path, capfd):
  rows = 3000
  file = write_parquet(tmp_path / "a.parquet", ["what is"] * rows, ["it is four"] * rows)
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  processes = [context.Process(target=_load_and_report, args=(file, queue)) for _ in range(2)]
  for process in processes:
    process.start()
  results = [queue.get(timeout=100) for _ in processes]
  for process in processes:
    process.join()
  assert results[0] == results[1] == load(file).tokens.tolist()
  assert capfd.readouterr().out.count("tokenising") == 1


def test_without_locks_an_entry_in_use_is_not_replaced(numbers, monkeypatch):
  """Another process made it while this one worked: it may be mapped already."""

  def no_locks(self):
    raise NotImplementedError

  monkeypatch.setattr(store.filelock.FileLock, "acquire", no_locks)
  original, theirs = tokenize._tokenise, []

  def meanwhile(writer, *arguments):
    if not theirs:
      theirs.append("started")
      load(numbers)
      theirs.extend(_made())
    original(writer, *arguments)

  def _made():
    files = tokenize.cache_root(data_config()).glob("*/tokens.bin")
    return [file.stat().st_ino for file in files if file.parent.suffix != ".new"]

  monkeypatch.setattr(tokenize, "_tokenise", meanwhile)
  assert len(load(numbers)) == 25
  assert _made() == theirs[1:]
  assert not list(tokenize.cache_root(data_config()).glob("*.new"))


def test_a_place_that_cannot_be_written_says_what_to_set(tmp_path, numbers, monkeypatch):
  blocked = tmp_path / "file"
  blocked.write_text("")
  monkeypatch.setenv("REFINE_JAX_CACHE", str(blocked))
  with pytest.raises(UserError, match="cannot be written.*config.data.cache_dir"):
    load(numbers)


def test_where_the_cache_is(tmp_path, monkeypatch):
  monkeypatch.setenv("REFINE_JAX_CACHE", "/one")
  assert tokenize.cache_root(data_config(cache_dir="/two")) == Path("/one/tokens")
  monkeypatch.delenv("REFINE_JAX_CACHE")
  assert tokenize.cache_root(data_config(cache_dir="/two")) == Path("/two/tokens")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert tokenize.cache_root(data_config()) == tmp_path / "refine_jax" / "tokens"


def test_stats_are_readable(numbers):
  load(numbers)
  stats = json.loads((_entry() / "stats.json").read_text())
  assert stats["examples"] == 25 and stats["dropped"] == {}
