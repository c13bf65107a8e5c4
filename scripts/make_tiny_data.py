"""Problems, tokenizer and model shape for the quickstart: all that a run from scratch needs.

    python scripts/make_tiny_data.py [data/tiny]

Each problem names an operation on a word of random letters ("reverse hadj" -> "jdah"), so answers
can be checked, and no held-out problem is among those trained on. Writes train.parquet,
val.parquet and test.parquet with the columns prompt, target, task, answer; and model/, a Hugging
Face directory with a character tokenizer and a config.json, but without weights.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tokenizers
import transformers

from refine_jax.cli import entry_point

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
_SPLITS = {"train": 40000, "val": 200, "test": 200}
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


def problems(count: int, generator: random.Random, seen: set) -> list[dict]:
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


def tokenizer() -> transformers.PreTrainedTokenizerFast:
  """One token a letter and one an operation."""
  words = [*_SPECIAL, *sorted(_TASKS), " ", *_LETTERS]
  core = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unknown>")
  )
  pattern = tokenizers.Regex("|".join([*sorted(_TASKS), "."]))
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
  output = Path(parser.parse_args().output)
  if output.exists():
    print(f"{output} is there already.")
    return
  temporary = output.with_name(output.name + ".new")
  shutil.rmtree(temporary, ignore_errors=True)
  (temporary / "model").mkdir(parents=True)
  generator, seen = random.Random(0), set()
  for split in ("test", "val", "train"):
    rows = problems(_SPLITS[split], generator, seen)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary / f"{split}.parquet")
  tiny = tokenizer()
  tiny.save_pretrained(temporary / "model")
  ids = {"eos_token_id": tiny.eos_token_id, "pad_token_id": tiny.eos_token_id}
  config = _MODEL | ids | {"vocab_size": len(tiny), "bos_token_id": None}
  (temporary / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  temporary.rename(output)
  print(f"{output}: " + ", ".join(f"{n} {split}" for split, n in _SPLITS.items()))


if __name__ == "__main__":
  main()
