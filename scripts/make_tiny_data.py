"""Problems, tokenizer and model shape for the quickstart: all that a run from scratch needs.

    python scripts/make_tiny_data.py [data/tiny]
    python scripts/make_tiny_data.py data/sums --problems=sums

A problem of "words" names an operation on a word of random letters ("reverse hadj" -> "jdah"), one
of "sums" is worked out in steps ("89+42-78" -> "89+42=131;131-78=53;answer 53"), and is much
harder. Answers can be checked, and no held-out problem is among those trained on. Writes
train.parquet, val.parquet and test.parquet with the columns prompt, target, task, answer; and
model/, a Hugging Face directory with a character tokenizer and a config.json, but without weights.
"""

import argparse
import random

import pyarrow
import pyarrow.parquet
import tokenizers
import transformers

from refine_jax import files
from refine_jax.cli import entry_point
from refine_jax.hf import model_files

_LETTERS = "abcdefghij"
_TASKS = {
  "reverse": lambda word: word[::-1],
  "next": lambda word: "".join(_LETTERS[(_LETTERS.index(c) + 1) % len(_LETTERS)] for c in word),
  "repeat": lambda word: word + word,
}
_SPECIAL = ("<eos>", "<user>", "<assistant>", "<unknown>")
_TEMPLATE = (
  "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SPLITS = {
  "words": {"train": 40000, "val": 200, "test": 200},
  "sums": {"train": 60000, "val": 200, "test": 300},
}
_VOCABULARIES = {
  "words": (*sorted(_TASKS), " ", *_LETTERS),
  "sums": ("answer", *" +-=;", *"0123456789"),
}
_MODEL = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_size": 128,
  "intermediate_size": 384,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "hidden_act": "silu",
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
  "initializer_range": 0.05,
}


def sums(count: int, generator: random.Random, seen: set) -> list[dict]:
  """Three or four numbers of two digits, added and subtracted, never below zero."""
  rows = []
  while len(rows) < count:
    numbers = [generator.randint(10, 99) for _ in range(generator.randint(3, 4))]
    signs = [generator.choice("+-") for _ in numbers[1:]]
    terms = list(zip(signs, numbers[1:], strict=True))
    text = str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in terms)
    total, steps = numbers[0], []
    for sign, number in terms:
      value = total + number if sign == "+" else total - number
      steps.append(f"{total}{sign}{number}={value}")
      total = value
      if total < 0:
        break
    if total < 0 or text in seen:
      continue
    seen.add(text)
    target = ";".join([*steps, f"answer {total}"])
    rows.append({"prompt": text, "target": target, "task": "sums", "answer": str(total)})
  return rows


def words(count: int, generator: random.Random, seen: set) -> list[dict]:
  rows = []
  while len(rows) < count:
    word = "".join(generator.choices(_LETTERS, k=generator.randint(4, 8)))
    task = generator.choice(sorted(_TASKS))
    if (task, word) in seen:
      continue
    seen.add((task, word))
    answer = _TASKS[task](word)
    rows.append({"prompt": f"{task} {word}", "target": answer, "task": task, "answer": answer})
  return rows


def tokenizer(vocabulary) -> transformers.PreTrainedTokenizerFast:
  """One token a character and one a word of the vocabulary."""
  tokens = [*_SPECIAL, *vocabulary]
  core = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unknown>")
  )
  pattern = tokenizers.Regex("|".join([*(t for t in vocabulary if len(t) > 1), "."]))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
  core.decoder = tokenizers.decoders.Fuse()
  core.add_special_tokens(list(_SPECIAL))
  result = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unknown>"
  )
  result.chat_template = _TEMPLATE
  return result


@entry_point
def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("output", nargs="?", default="data/tiny")
  parser.add_argument("--problems", choices=_SPLITS, default="words")
  arguments = parser.parse_args()
  output, splits = files.local_path(arguments.output, "OUTPUT"), _SPLITS[arguments.problems]
  make = {"words": words, "sums": sums}[arguments.problems]
  if output.exists():
    print(f"{output} is there already.")
    return
  generator, seen = random.Random(0), set()
  with files.new_directory(output) as temporary:
    for split in ("test", "val", "train"):
      rows = make(splits[split], generator, seen)
      pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary / f"{split}.parquet")
    tiny = tokenizer(_VOCABULARIES[arguments.problems])
    model_files.save_tokenizer(tiny, temporary / "model")
    ids = {"eos_token_id": tiny.eos_token_id, "pad_token_id": tiny.eos_token_id}
    config = _MODEL | ids | {"vocab_size": len(tiny), "bos_token_id": None}
    files.write_json(temporary / "model" / "config.json", config)
  print(f"{output}: " + ", ".join(f"{n} {split}" for split, n in splits.items()))


if __name__ == "__main__":
  main()
