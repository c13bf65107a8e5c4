"""Fuzzers of chat messages and of files of rows."""

import io
import json

import hypothesis
import pyarrow
import pyarrow.parquet
from chat_fields_test import TEMPLATE, asking, call
from data_fixtures import load, make_tokenizer, message
from fuzzing import damaged_bytes, fuzz, scalars, taken_or_refused, values
from hypothesis import strategies as st

from refine_jax.data import Examples
from refine_jax.errors import UserError
from refine_jax.text import chat

TOKENIZER = make_tokenizer(TEMPLATE)
texts = st.sampled_from(["a", "", " ", "<think>\nwhy", "<|end|>", "é\ud800", "x" * 300])
roles = st.sampled_from(["user", "assistant", "system", "tool"])
calls = st.builds(lambda n, a: {"function": {"name": n, "arguments": a}}, texts, values)
turns = st.fixed_dictionaries(
  {"role": roles | scalars, "content": texts | values},
  optional={
    "tool_calls": st.lists(calls | values, max_size=2) | values,
    "reasoning_content": texts | values,
    "name": values,
  },
)
conversations = texts | st.lists(turns | values, max_size=3) | values


@fuzz(prompt=conversations, target=conversations)
def test_messages_of_any_shape_are_texts_or_a_reason(prompt, target):
  result = taken_or_refused(
    chat.example_texts, TOKENIZER, prompt, target, refusals=(chat.BadExample, UserError)
  )
  if isinstance(result, chat.Texts):
    assert result.response.strip()
    assert (result.prompt + result.response).encode()


def read(file):
  """Loads a file, with what a run would look at."""
  examples = load(str(file), TOKENIZER)
  assert isinstance(examples, Examples) and len(examples) > 0
  assert examples.lengths.min() > 1 and examples.prompt_lengths.min() > 0
  return examples


good = {"prompt": [message("user", "a"), asking(call("add", a=1))], "target": "x"}


@fuzz(rows=st.lists(st.fixed_dictionaries({"prompt": conversations, "target": conversations})))
def test_json_lines_of_any_rows_are_kept_or_dropped(rows, tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text("".join(f"{json.dumps(row)}\n" for row in [good, *rows]))
  examples = taken_or_refused(read, file)
  if isinstance(examples, Examples):
    assert len(examples) + sum(examples.dropped.values()) == len(rows) + 1


@fuzz(
  prompts=st.lists(conversations, min_size=1, max_size=4), target=st.one_of(texts, turns, scalars)
)
def test_parquet_of_any_rows_is_kept_or_dropped(prompts, target, tmp_path):
  rows = [good, *({"prompt": p, "target": target} for p in prompts)]
  try:
    table = pyarrow.Table.from_pylist(rows if isinstance(target, str) else rows[1:])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  except (pyarrow.ArrowException, OverflowError, UnicodeError):
    hypothesis.reject()  # no column that Arrow could hold
  examples = taken_or_refused(read, tmp_path / "a.parquet")
  if isinstance(examples, Examples):
    assert len(examples) + sum(examples.dropped.values()) == len(table)


def parquet_bytes(rows) -> bytes:
  file = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  return file.getvalue()


@fuzz(content=damaged_bytes(parquet_bytes([good, good])))
def test_damaged_parquet_is_read_or_refused(content, tmp_path):
  (tmp_path / "a.parquet").write_bytes(content)
  taken_or_refused(read, tmp_path / "a.parquet")


@fuzz(content=damaged_bytes(f"{json.dumps(good)}\n".encode() * 2))
def test_damaged_json_lines_are_read_or_refused(content, tmp_path):
  (tmp_path / "a.jsonl").write_bytes(content)
  taken_or_refused(read, tmp_path / "a.jsonl")
