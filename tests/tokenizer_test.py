"""Tokenizers do what their files say; damaged ones, and ids without a token, end nothing."""

import json

import pytest
import tokenizers
import transformers
from data_fixtures import EOS, make_tokenizer
from fuzzing import damaged_bytes, damaged_json, fuzz, taken_or_refused
from hypothesis import strategies as st

from refine_jax.errors import UserError
from refine_jax.text import chat, detokenize, tokenizer

CLASSES = ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer", "CohereTokenizer"]
TEXTS = [
  "what is 1234 and four?",
  "  The   quick\n\nbrown",
  "ｆｕｌｌ Ｗｉｄｔｈ é",
  "user\nhello<|end|>\n",
]


def save(place, kind="PreTrainedTokenizerFast", **parts):
  """A tokenizer's directory whose config names a class, and whose file has these parts."""
  make_tokenizer().save_pretrained(place)
  core = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
  for name, part in parts.items():
    setattr(core, name, part)
  core.save(str(place / "tokenizer.json"))
  config = json.loads((place / "tokenizer_config.json").read_text())
  (place / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
  return core


@pytest.mark.parametrize("kind", CLASSES)
def test_ids_and_texts_are_those_of_the_file_whatever_class_the_config_names(tmp_path, kind):
  pre = tokenizers.pre_tokenizers
  core = save(
    tmp_path,
    kind,
    normalizer=tokenizers.normalizers.NFKC(),
    pre_tokenizer=pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)]),
  )
  ours = tokenizer.load_tokenizer(tmp_path)
  for text in TEXTS:
    ids = core.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(ours, [text]) == [ids]
    assert ours.decode(ids) == core.decode(ids, skip_special_tokens=False)
  assert ours.eos_token == EOS and ours.chat_template == make_tokenizer().chat_template


def test_a_class_of_transformers_would_have_made_another_tokenizer(tmp_path):
  """So that the test above has something to find."""
  pre = tokenizers.pre_tokenizers
  core = save(tmp_path, "Qwen2Tokenizer", pre_tokenizer=pre.ByteLevel(add_prefix_space=True))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs.backend_tokenizer.pre_tokenizer.__getstate__() != core.pre_tokenizer.__getstate__()


def test_a_difference_that_stays_is_the_users_error(tmp_path, monkeypatch):
  save(tmp_path)
  monkeypatch.setattr(tokenizer, "_differing_parts", lambda *_: ["decoder"])
  with pytest.raises(UserError, match="makes another decoder of .* than its tokenizer.json has"):
    tokenizer.load_tokenizer(tmp_path)


def test_ids_without_a_token_stream_and_leave_the_text_as_it_is():
  mine = make_tokenizer()
  ids = tokenizer.encode(mine, ["what is two and two?"])[0]
  gap = len(mine) + 7
  with_gaps = [gap, *ids[:3], gap, gap, *ids[3:], gap]
  assert detokenize.decode(mine, with_gaps) == "what is two and two?"
  answer = detokenize.GrowingAnswer(mine, ("two?",))
  for i, token in enumerate(with_gaps):
    answer.extend([token], finished=i == len(with_gaps) - 1)
  assert answer.text == "what is two and " and answer.stopped
  assert answer.tokens == with_gaps[: len(answer.tokens)]


@pytest.mark.parametrize(
  "name, content",
  [
    ("tokenizer.json", b"{"),
    ("tokenizer.json", b'{"model": 3}'),
    ("tokenizer.json", b"\xff\xfe\x00"),
    ("tokenizer_config.json", b"[]"),
    ("tokenizer_config.json", b'{"eos_token": 5}'),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
    ("chat_template.jinja", b"\xff\xfe\x00"),
  ],
)
def test_a_damaged_file_is_the_users_error_and_says_where(tmp_path, name, content):
  save(tmp_path)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=f"'{tmp_path}' has no tokenizer that can be loaded: "):
    tokenizer.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  "name", ["./none", "/" + "x" * 5000, "~nosuchuser", "x" * 5000, "a\0b", ""]
)
def test_a_name_without_a_tokenizer_is_one_short_line(name):
  with pytest.raises(UserError) as raised:
    tokenizer.load_tokenizer(name)
  assert len(str(raised.value)) < 1000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  place = tmp_path_factory.mktemp("tokenizer")
  save(place)
  return {path.name: path.read_bytes() for path in place.iterdir()}


def use(place):
  """All that a run does with a tokenizer."""
  mine = tokenizer.load_tokenizer(place)
  chat.check_tokenizer(mine)
  ids = chat.encode_prompt(mine, "what is two")
  answer = detokenize.GrowingAnswer(mine, ("b",))
  answer.extend(ids, True)
  return answer.text + detokenize.decode(mine, ids) + str(detokenize.special_ids(mine))


TOKENIZER = json.loads(make_tokenizer().backend_tokenizer.to_str())
CONFIG = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "eos_token": EOS,
  "pad_token": {"content": "<|pad|>", "special": True},
  "model_max_length": 1000,
  "padding_side": "left",
  "added_tokens_decoder": {"1": {"content": EOS, "special": True, "lstrip": False}},
  "extra_special_tokens": ["<|start|>"],
  "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
SPECIAL = {"eos_token": EOS, "pad_token": {"content": "<|pad|>", "lstrip": False}}
TEMPLATE = make_tokenizer().chat_template.encode()
DAMAGED = st.one_of(
  st.tuples(st.just("tokenizer.json"), damaged_json(TOKENIZER)),
  st.tuples(st.just("tokenizer_config.json"), damaged_json(CONFIG)),
  st.tuples(st.just("special_tokens_map.json"), damaged_json(SPECIAL)),
  st.tuples(st.just("chat_template.jinja"), damaged_bytes(TEMPLATE)),
)


@fuzz(damaged=DAMAGED)
def test_damaged_tokenizer_files_are_used_or_refused(damaged, files, tmp_path):
  name, content = damaged
  for other, whole in files.items():
    (tmp_path / other).write_bytes(whole)
  (tmp_path / name).write_bytes(content)
  try:
    taken_or_refused(use, tmp_path)
  finally:
    (tmp_path / name).unlink()
