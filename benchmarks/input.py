"""The host side: tokenisation, cached start, packing, batches a second, and what the device waits.

    python -m benchmarks.input --shape=1.5b --step_ms=600
    python -m benchmarks.input --data=train.parquet --tokenizer=DIR --max_length=512 --batch=64

Without --data it makes a parquet file of random words and a byte-level tokenizer for it. The token
cache is a new, temporary one, so the first reading is cold.
"""

import dataclasses
import itertools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
import transformers

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.input")

from benchmarks import timing
from refine_jax.config import DataConfig
from refine_jax.data import load_examples, train_iterator, train_rows
from refine_jax.text.tokenizer import load_tokenizer

# Examples, and milliseconds that a step is taken to last.
_DEFAULTS = {"tiny": (2000, 20.0), "135m": (20000, 150.0), "1.5b": (20000, 600.0)}
_TEMPLATE = (
  "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
  "{% if add_generation_prompt %}<|start|>{% endif %}"
)
_WAITED_STEPS = (5, 50)  # fewest and most that the wait is measured over
_WAITED_SECONDS = 15


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--data", help="parquet, a glob, or several separated by commas")
  parser.add_argument("--tokenizer", help="its directory; goes with --data")
  parser.add_argument("--prompt_key", default="prompt")
  parser.add_argument("--response_key", default="target")
  parser.add_argument("--examples", type=int, help="without --data: how many to make")
  parser.add_argument("--max_length", type=int, help="default: the shape's length")
  parser.add_argument("--batch", type=int, help="rows; default: the shape's")
  parser.add_argument("--max_segments", type=int, default=64)
  parser.add_argument("--prefetch", type=int, default=4)
  parser.add_argument("--batches", type=int, default=50, help="that the rate is taken over")
  parser.add_argument("--step_ms", type=float, help="how long the device works on a batch")
  arguments = parser.parse_args(argv)
  if bool(arguments.data) != bool(arguments.tokenizer):
    parser.error("--data and --tokenizer go together.")
  with tempfile.TemporaryDirectory() as directory:
    # The variable would win over the config's key.
    with mock.patch.dict(os.environ, {"REFINE_JAX_CACHE": str(Path(directory) / "cache")}):
      return timing.report(*_measure(arguments, Path(directory)), arguments.json)


def _measure(arguments, directory: Path) -> tuple:
  shape = timing.SHAPES[arguments.shape]
  count, step_ms = _DEFAULTS[arguments.shape]
  length, batch_size = arguments.max_length or shape.length, arguments.batch or shape.rows
  step_ms = step_ms if arguments.step_ms is None else arguments.step_ms
  if arguments.data:
    files, tokenizer = arguments.data, load_tokenizer(arguments.tokenizer)
  else:
    texts = synthetic_texts(arguments.examples or count, length)
    files, tokenizer = _write(texts, directory), byte_tokenizer()
  data = DataConfig(
    train_files=files,
    val_files="",
    prompt_key=arguments.prompt_key,
    response_key=arguments.response_key,
    max_length=length,
    truncation="right",
    pack=True,
    max_segments=arguments.max_segments,
    chat_template="",
    cache_dir="",
    prefetch=arguments.prefetch,
  )

  def load():
    start = time.perf_counter()
    examples = load_examples(files, data, tokenizer, name="train", vocab_size=len(tokenizer))
    return examples, time.perf_counter() - start

  examples, cold = load()
  examples, cached = load()
  rows = []
  for packed in (True, False):
    start = time.perf_counter()
    changed = dataclasses.replace(data, pack=packed)
    # Enough epochs for every batch asked for.
    made = train_rows(examples, changed, batch_size=batch_size, total_epochs=10**6, seed=0)
    pack_seconds = time.perf_counter() - start
    rate = throughput(made, arguments.prefetch, arguments.batches)
    wait = host_wait(made, arguments.prefetch, step_ms / 1e3)
    rows.append(
      {
        "variant": "packed" if packed else "one example a row",
        "rows_an_epoch": made.packing.rows,
        "most_examples_a_row": made.max_segments,
        "packing_efficiency": made.packing_efficiency,
        "pack_seconds": pack_seconds,
        **rate,
        **wait,
      }
    )
  summary = {
    "shape": f"batches of {batch_size} x {length}, prefetch {arguments.prefetch}",
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "examples": len(examples),
    "tokens": len(examples.tokens),
    "mean_length": len(examples.tokens) / len(examples),
    "cold_start_seconds": cold,
    "tokenise_tokens_per_second": len(examples.tokens) / cold,
    "cached_start_seconds": cached,
    "step_ms": step_ms,
    "packing_efficiency": rows[0]["packing_efficiency"],
    "packing_gain": rows[0]["packing_efficiency"] / rows[1]["packing_efficiency"],
    "tokens_per_second": rows[0]["tokens_per_second"],
    "wait_share": rows[0]["wait_share"],
  }
  return rows, summary


def throughput(rows, prefetch: int, count: int) -> dict:
  """Batches and real tokens a second where nobody works on them, thread start apart."""
  iterator = train_iterator(rows, accumulation=1, prefetch=prefetch)
  # The first ones pay for the threads and for the epoch's draw. What was ready is used up by
  # then, so that the rate is that of making batches.
  for _ in range(prefetch + 1):
    next(iterator)
  tokens, start = 0, time.perf_counter()
  for batch in itertools.islice(iterator, count):
    tokens += int(np.count_nonzero(batch.segment_ids))
  seconds = time.perf_counter() - start
  return {
    "batches_per_second": count / seconds,
    "tokens_per_second": tokens / seconds,
    "tokens_a_batch": tokens / count,
  }


def host_wait(rows, prefetch: int, step_seconds: float) -> dict:
  """What a step waits for its batch, the first one's wait apart, and its share of the step.

  The step is a sleep, which leaves the host's cores to the pipeline as a step on a device does.
  """
  fewest, most = _WAITED_STEPS
  steps = int(np.clip(_WAITED_SECONDS / max(step_seconds, 1e-6), fewest, most))
  iterator = train_iterator(rows, accumulation=1, prefetch=prefetch)
  next(iterator)
  waits = []
  for _ in range(steps):
    time.sleep(step_seconds)
    start = time.perf_counter()
    next(iterator)
    waits.append(time.perf_counter() - start)
  mean = statistics.fmean(waits)
  return {"wait_ms": mean * 1e3, "wait_share": mean / (mean + step_seconds)}


def synthetic_texts(count: int, max_length: int) -> tuple[list[str], list[str]]:
  """Prompts and responses of random words; their lengths vary as those of real answers do."""
  generator = random.Random(0)
  letters = "abcdefghijklmnopqrstuvwxyz"
  words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(2000)]

  def text(mean: float) -> str:
    # Log-normal; about six tokens of one byte a word.
    return " ".join(generator.choices(words, k=1 + int(generator.lognormvariate(0, 0.8) * mean)))

  mean = max_length / 6 / 8
  return [text(mean / 2) for _ in range(count)], [text(mean) for _ in range(count)]


def _write(texts, directory: Path) -> str:
  path = directory / "train.parquet"
  table = pyarrow.table({"prompt": texts[0], "target": texts[1]})
  pyarrow.parquet.write_table(table, path)
  return str(path)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """One token a byte: what there is without training on a text."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate(alphabet)}
  core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  core.add_special_tokens(["<|end|>", "<|start|>"])
  result = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", name_or_path="bytes"
  )
  result.chat_template = _TEMPLATE
  return result


if __name__ == "__main__":
  timing.run(main)
