"""Messages with more than role and content: nulls of Arrow, tool calls, reasoning."""

import functools

import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import EOS, load, make_tokenizer, message, targets

from refine_jax.text import chat

CALLS = (
  "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
  " {{ c.function.arguments | tojson }}</call>{% endfor %}{% endif %}"
)
TEMPLATE = (
  "{% for m in messages %}<|start|>{{ m['role'] }}\n"
  "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
  "{{ m['content'] }}" + CALLS + "<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ADDING_TEMPLATE = (
  "{% for m in messages %}{{ '<|start|>' + m.role + m.content }}" + CALLS + "{% endfor %}"
)


def call(name, **arguments):
  return {"function": {"name": name, "arguments": arguments}}


def asking(*calls, content=""):
  return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def conversation(*calls, **more):
  return [message("user", "q"), asking(*calls, **more), message("tool", "r")]


def written(path, rows, schema=None):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
  return str(path)


PROMPTS = [
  conversation(call("weather", city="Rome")),
  conversation(call("add", a=1, b=2), call("find", q={"word": "x", "in": [{"y": 1}, {"z": 2}]})),
  conversation(call("now")),
  [message("user", "q")],
]


def test_nulls_that_arrow_fills_in_are_absent_at_any_depth(tmp_path):
  tokenizer = make_tokenizer(TEMPLATE)
  rows = [{"prompt": prompt, "target": "x"} for prompt in PROMPTS]
  examples = load(written(tmp_path / "a.parquet", rows), tokenizer, max_length=512)
  for i, prompt in enumerate(PROMPTS):
    ids = examples.example(i)[: examples.prompt_lengths[i]]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
      prompt, tokenize=False, add_generation_prompt=True
    )


def test_arguments_in_a_map_column_are_an_object(tmp_path):
  arguments = pyarrow.map_(pyarrow.string(), pyarrow.string())
  function = pyarrow.struct({"name": pyarrow.string(), "arguments": arguments})
  calls = pyarrow.list_(pyarrow.struct({"function": function}))
  turn = pyarrow.struct(
    {"role": pyarrow.string(), "content": pyarrow.string(), "tool_calls": calls}
  )
  schema = pyarrow.schema([("prompt", pyarrow.list_(turn)), ("target", pyarrow.string())])
  prompt = conversation(call("weather", city="Rome"))
  file = written(tmp_path / "a.parquet", [{"prompt": prompt, "target": "x"}], schema)
  tokenizer = make_tokenizer(TEMPLATE)
  examples = load(file, tokenizer, max_length=512)
  text = tokenizer.decode(examples.example(0)[: examples.prompt_lengths[0]])
  assert text == chat.prompt_text(tokenizer, prompt)


@pytest.mark.parametrize("text", [TEMPLATE, ADDING_TEMPLATE])
def test_null_content_next_to_calls_is_empty(text):
  tokenizer, prompt = make_tokenizer(text), conversation(call("add", a=1), content=None)
  rendered = chat.prompt_text(tokenizer, prompt)
  assert '<call>add {"a": 1}</call>' in rendered
  assert rendered == chat.prompt_text(tokenizer, conversation(call("add", a=1), content=""))


def test_null_content_next_to_calls_that_are_not_printed_is_no_message():
  prompt = conversation(call("add", a=1), content=None)
  with pytest.raises(chat.BadExample, match="calls next to null content"):
    chat.prompt_text(make_tokenizer(), prompt)


def test_a_message_nested_beyond_pythons_limit_is_no_message():
  deep = functools.reduce(lambda inner, _: [inner], range(5000), [])
  with pytest.raises(chat.BadExample, match="nested too deeply"):
    chat.prompt_text(make_tokenizer(), [{"role": "user", "content": "a", "extra": deep}])


def test_null_content_without_calls_is_no_message():
  for calls in (None, []):
    turns = [{"role": "assistant", "content": None, "tool_calls": calls}]
    with pytest.raises(chat.BadExample, match="not a string or messages"):
      chat.prompt_text(make_tokenizer(TEMPLATE), turns)


@pytest.mark.parametrize(
  "target",
  [
    asking(call("add", a=1), content="so"),
    asking(call("add", a=1), content=""),
    message("assistant", "four") | {"reasoning_content": "two and two"},
  ],
)
def test_calls_and_reasoning_of_a_target_are_trained_on_through_the_template(tmp_path, target):
  tokenizer = make_tokenizer(TEMPLATE)
  rows = [
    {"prompt": "q", "target": [target]},
    {"prompt": "q", "target": [asking(call("find", word="x"))]},  # brings nulls into the first
  ]
  examples = load(written(tmp_path / "a.parquet", rows), tokenizer, max_length=512)
  whole = tokenizer.apply_chat_template([message("user", "q"), target], tokenize=False)
  assert tokenizer.decode(examples.example(0)) == whole.rstrip()
  assert tokenizer.decode(examples.example(0)[: examples.prompt_lengths[0]]).endswith("assistant\n")
  assert examples.example(0).tolist().count(tokenizer.eos_token_id) == 2  # of the user and its own


def test_a_null_content_next_to_calls_is_a_target(tmp_path):
  target = asking(call("add", a=1), content=None)
  rows = [{"prompt": "q", "target": [target]}]
  examples = load(written(tmp_path / "a.parquet", rows), make_tokenizer(TEMPLATE), max_length=512)
  assert targets(examples) == ['<call>add {"a": 1}</call>' + EOS]


def test_calls_and_reasoning_that_the_template_does_not_print_drop_the_row(tmp_path, capsys):
  rows = [
    {"prompt": "q", "target": [message("assistant", "x") | {"reasoning": "why"}]},
    {"prompt": "q", "target": [message("assistant", "y") | {"reasoning": ""}]},
    {"prompt": "q", "target": [asking(call("add", a=1), content="z")]},
  ]
  examples = load(written(tmp_path / "a.parquet", rows))
  assert targets(examples) == ["y" + EOS]
  printed = capsys.readouterr().out
  for field in ("reasoning", "tool_calls"):
    reason = f"target with {field}, which the chat template does not print"
    assert examples.dropped.pop(reason) == 1
    assert f"dropped 1 ({reason})" in printed
  assert not examples.dropped


def test_other_fields_of_a_target_are_left_out_counted_and_printed(tmp_path, capsys):
  rows = [{"prompt": "q", "target": [message("assistant", "x") | {"model": "m"}]}] * 2
  file = written(tmp_path / "a.parquet", rows)
  for _ in range(2):  # tokenised, and from the cache
    assert targets(load(file)) == ["x" + EOS] * 2
    printed = capsys.readouterr().out
    assert "2 with model of the target left out, which the chat template does not print" in printed


def test_a_template_that_writes_the_prompt_anew_for_a_target_drops_the_row():
  text = "{% if messages[-1].tool_calls %}tools{% endif %}" + TEMPLATE
  with pytest.raises(chat.BadExample, match="target with tool_calls: .* changes the prompt"):
    chat.example_texts(make_tokenizer(text), "q", [asking(call("add", a=1))])
