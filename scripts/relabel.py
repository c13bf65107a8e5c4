"""Replaces the responses of a parquet file by a model's own greedy answers.

    python scripts/relabel.py --model=DIR --data=train.parquet --output=relabelled.parquet

A model that learns to decode its own text in parallel has nothing else to learn, so its accuracy
does not drift (self-distillation). With --scorer, answers that are wrong leave the response as it
was; without it, every answer that ended is taken. Answers that ran into --max_new_tokens leave it
as it was too. What was done is counted and printed.
"""

import argparse
import collections

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from refine_jax import files
from refine_jax.cli import entry_point
from refine_jax.decoding import generation, loading
from refine_jax.decoding import settings as sampler_settings
from refine_jax.errors import UserError
from refine_jax.evaluation import scoring


def relabel(model, rows: list[dict], arguments, score) -> tuple[list[str | None], list[str]]:
  """The model's answers (None: keep the response), and for each row what was done."""
  # The last batch is filled up, so that it needs no program of its own.
  prompts = [row[arguments.prompt_key] for row in rows]
  prompts += prompts[:1] * (arguments.batch_size - len(rows))
  out = generation.generate(
    model,
    prompts,
    block_size=arguments.block_size,
    draft=arguments.draft,
    max_new_tokens=arguments.max_new_tokens,
  )
  answers, reasons = [], []
  for row, text, stopped in zip(rows, out.texts, out.stopped, strict=False):
    reason = "relabelled"
    if not stopped:
      reason = "kept: no end within --max_new_tokens"
    elif not text.strip():
      reason = "kept: empty answer"
    elif score and not score(text, row):
      reason = "kept: wrong answer"
    answers.append(text if reason == "relabelled" else None)
    reasons.append(reason)
  return answers, reasons


def with_responses(batch: pyarrow.RecordBatch, key: str, answers: list) -> pyarrow.RecordBatch:
  """The batch with `answers` in the place of its responses where there are any."""
  index = batch.schema.get_field_index(key)
  old = batch.column(index)
  if not (pyarrow.types.is_string(old.type) or pyarrow.types.is_large_string(old.type)):
    raise UserError(f"Column {key!r} holds {old.type}, not strings (--response_key).")
  new = [o if a is None else a for o, a in zip(old.to_pylist(), answers, strict=True)]
  return batch.set_column(index, batch.schema.field(index), pyarrow.array(new, old.type))


def read_schema(path: str, keys: list[str]) -> pyarrow.Schema:
  try:
    schema = pyarrow.parquet.read_schema(path)
  except (OSError, pyarrow.ArrowInvalid) as error:
    raise UserError(f"{path} is not a parquet file that can be read: {error}") from error
  for key in keys:
    if key not in schema.names:
      raise UserError(f"{path} has no column {key!r}; it has {', '.join(schema.names)}.")
  return schema


@entry_point
def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True, help="Hugging Face directory, hub name or workdir")
  parser.add_argument("--data", required=True, help="a parquet file")
  parser.add_argument("--output", required=True, help="a new parquet file")
  parser.add_argument("--prompt_key", default="prompt")
  parser.add_argument("--response_key", default="target")
  parser.add_argument("--scorer", help="only right answers: auto, " + ", ".join(scoring.SCORERS))
  parser.add_argument("--block_size", type=int, default=8)
  parser.add_argument(
    "--draft",
    default="ngram",
    choices=sampler_settings.DRAFTS,
    help="of the exact mode; the text is the same",
  )
  parser.add_argument("--max_new_tokens", type=int, default=512)
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--dtype", help="of the parameters; default: as stored")
  arguments = parser.parse_args()
  output = files.local_path(arguments.output, "--output")
  files.refuse_used(output, "--output")
  schema = read_schema(arguments.data, [arguments.prompt_key, arguments.response_key])
  model = loading.load(arguments.model, dtype=arguments.dtype)
  model.require_tokenizer()
  score, counts = None, collections.Counter()
  with (
    files.new_file(output) as temporary,
    pyarrow.parquet.ParquetFile(arguments.data) as file,
    pyarrow.parquet.ParquetWriter(temporary, schema) as writer,
    tqdm(total=file.metadata.num_rows, unit="row") as bar,
  ):
    for batch in file.iter_batches(arguments.batch_size):
      rows = batch.to_pylist()
      if arguments.scorer and score is None:
        score = scoring.choose(arguments.scorer, rows[0])
      answers, reasons = relabel(model, rows, arguments, score)
      writer.write_batch(with_responses(batch, arguments.response_key, answers))
      counts.update(reasons)
      bar.update(len(rows))
  print(f"{output}: " + ", ".join(f"{n} {reason}" for reason, n in counts.most_common()))


if __name__ == "__main__":
  main()
