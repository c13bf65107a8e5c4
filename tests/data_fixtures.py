"""Tokenizers, parquet files and configs for the tests of the data package."""

import dataclasses
import functools

import pyarrow
import pyarrow.parquet
import tokenizers
import transformers

from refine_jax.config import DataConfig
from refine_jax.data import load_examples

EOS = "<|end|>"
START = "<|start|>"
CHAT_TEMPLATE = (
  "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINK_TEMPLATE = CHAT_TEMPLATE.replace("<|start|>assistant\n", "<|start|>assistant\n<think>\n")
# Ends where the response's text goes on without a special token between them, so that a
# tokenizer that saw both at once would merge across the boundary.
BARE_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
_TRAINING_TEXT = [
  "the quick brown fox jumps over the lazy dog, and the number is 42",
  "what is two and two? it is four, and the answer to the question is simple",
  "<think>\nthe reasoning goes here\n</think>\nthe answer",
  "user assistant system hello world a b c d e f g h",
] * 4


@functools.cache
def _backend() -> str:
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    show_progress=False,
    special_tokens=["<|pad|>", EOS, START],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  backend.train_from_iterator(_TRAINING_TEXT, trainer)
  return backend.to_str()


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE, eos: str | None = EOS):
  """A byte-level BPE of 400 entries, trained on four lines; every byte has a token."""
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(_backend()),
    eos_token=eos,
    pad_token="<|pad|>",
    name_or_path="tiny-tokenizer",
  )
  tokenizer.chat_template = chat_template
  return tokenizer


def data_config(**changes) -> DataConfig:
  config = DataConfig(
    train_files="",
    val_files="",
    prompt_key="prompt",
    response_key="target",
    max_length=64,
    truncation="right",
    pack=True,
    max_segments=64,
    chat_template="",
    cache_dir="",
    prefetch=2,
  )
  return dataclasses.replace(config, **changes)


def write_parquet(path, prompts, targets, **options) -> str:
  """Columns `prompt` and `target`; lists of dicts become lists of structs."""
  table = pyarrow.table({"prompt": prompts, "target": targets})
  pyarrow.parquet.write_table(table, path, **options)
  return str(path)


def message(role: str, content: str) -> dict:
  return {"role": role, "content": content}


def load(files, tokenizer=None, **changes):
  tokenizer = tokenizer or make_tokenizer()
  return load_examples(
    files, data_config(**changes), tokenizer, name="train", vocab_size=len(tokenizer)
  )


def targets(examples, tokenizer=None) -> list[str]:
  tokenizer = tokenizer or make_tokenizer()
  spans = zip(map(examples.example, range(len(examples))), examples.prompt_lengths, strict=True)
  return [tokenizer.decode(ids[start:]) for ids, start in spans]
