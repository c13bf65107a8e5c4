"""Tokenised examples on disk: found again, made anew where they must be, never in the way."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import BARE_TEMPLATE, data_config, load, make_tokenizer, targets, write_parquet

from refine_jax.data import store, tokenize
from refine_jax.errors import UserError


@pytest.fixture
def numbers(tmp_path):
  return write_parquet(
    tmp_path / "a.parquet", [f"what is {i}" for i in range(25)], [f"it is {i}" for i in range(25)]
  )


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
    name(),
    name(max_length=32),
    name(truncation="left"),
    name(response_key="prompt"),
    name([other]),
    name([numbers, other]),
    name([other, numbers]),
    name(tokenizer=bos),
    name(tokenizer=added),
    name(tokenizer=make_tokenizer(BARE_TEMPLATE)),
    name(tokenizer=make_tokenizer(None), chat_template="a"),
    name(tokenizer=make_tokenizer(None), chat_template="b"),
  ]
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
