"""Replaces the responses of a parquet file by a model's own greedy answers.

    python scripts/relabel.py --model=DIR --data=train.parquet --output=relabelled.parquet

A model that learns to decode its own text in parallel has nothing else to learn, so its accuracy
does not drift (self-distillation). With --scorer, answers that are wrong leave the response as it
was; without it, every answer that ended is taken. Answers that ran into --max_new_tokens leave it
as it was too, and so does a prompt that cannot be answered (null, too long, no prompt): every row
of the file is in the output, in its place. What was done is counted and printed, and rows that
could not be answered or scored are named.
"""

import argparse
import collections
import itertools
import sys
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from tqdm import tqdm

from refine_jax import files
from refine_jax.cli import entry_point, whole_number
from refine_jax.data import parquet
from refine_jax.decoding import generation, loading
from refine_jax.decoding.options import DRAFTS, Options
from refine_jax.decoding.prompts import refusals
from refine_jax.errors import UserError
from refine_jax.evaluation import scoring

_RELABELLED = "relabelled"
_BATCHES_A_CALL = 32  # read and answered at a time
_NAMED = 10  # rows in the terminal that could not be answered or scored


def relabel(model, rows: list[dict], arguments, score) -> tuple[list[str | None], list, dict]:
  """Answers a batch.

  Returns:
    the answers (None: keep the response); for each row what was done; index -> why a row could not
    be answered or scored.
  """
  bad = refusals(model, [row[arguments.prompt_key] for row in rows])
  good = [i for i in range(len(rows)) if i not in bad]
  answers, done = [None] * len(rows), ["kept: cannot be answered"] * len(rows)
  if not good:
    return answers, done, bad
  out = generation.attempt(
    model,
    [rows[i][arguments.prompt_key] for i in good],
    slots=arguments.batch_size,
    block_size=arguments.block_size,
    draft=arguments.draft,
    max_new_tokens=arguments.max_new_tokens,
  )
  for place in out.not_finite:
    bad[good[place]] = generation.NOT_FINITE
  for i, text, stopped in zip(good, out.texts, out.stopped, strict=True):
    if i in bad:
      continue
    try:
      done[i] = _done(rows[i], text, stopped, score)
    except scoring.Unscorable as error:
      done[i], bad[i] = "kept: cannot be scored", str(error)
    answers[i] = text if done[i] == _RELABELLED else None
  return answers, done, bad


def _done(row: dict, text: str, stopped: bool, score) -> str:
  if not stopped:
    return "kept: no end within --max_new_tokens"
  if not text.strip():
    return "kept: empty answer"
  return "kept: wrong answer" if score and not score(text, row) else _RELABELLED


def with_responses(
  batch: pyarrow.RecordBatch, schema: pyarrow.Schema, key: str, answers: list
) -> pyarrow.RecordBatch:
  """The batch with `answers` in the place of its responses where there are any."""
  index = schema.get_field_index(key)
  field = schema.field(index)
  new = pyarrow.array(answers, field.type)
  responses = pyarrow.compute.coalesce(new, batch.column(index).cast(field.type))
  return batch.set_column(index, field, responses)


def read_schema(path: str, prompt_key: str, response_key: str) -> pyarrow.Schema:
  """The output's schema: the file's, but with categories of responses as strings.

  Raises:
    UserError: no parquet file, or one without the columns.
  """
  if parquet.is_json_lines(Path(path)):
    raise UserError(f"{path} is no parquet file, whose columns are kept as they are; convert it.")
  names = parquet.columns(Path(path))
  for key in (prompt_key, response_key):
    if key not in names:
      raise UserError(f"{path} has no column {key!r}; it has {', '.join(names)}.")
  schema = pyarrow.parquet.read_schema(path)
  index = schema.get_field_index(response_key)
  field = schema.field(index)
  kind = field.type.value_type if pyarrow.types.is_dictionary(field.type) else field.type
  if pyarrow.types.is_null(kind):  # no response yet
    kind = pyarrow.string()
  if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
    raise UserError(f"Column {response_key!r} holds {kind}, not strings (--response_key).")
  return schema.set(index, field.with_type(kind))


def parse() -> argparse.Namespace:
  """The command line, of which everything is checked that can be without a model."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--model", required=True, help="Hugging Face directory, hub name or workdir")
  add("--data", required=True, help="a parquet file")
  add("--output", required=True, help="a new parquet file")
  add("--prompt_key", default="prompt")
  add("--response_key", default="target")
  add("--scorer", help="only right answers: auto, " + ", ".join(scoring.SCORERS))
  add("--block_size", type=whole_number("--block_size", 1), help="tokens that a pass can commit")
  add("--draft", choices=DRAFTS, help="of the exact mode; the text is the same (auto)")
  add("--max_new_tokens", type=whole_number("--max_new_tokens", 1), default=512)
  add("--batch_size", type=whole_number("--batch_size", 1), default=64)
  add("--dtype", help="of the parameters; default: as stored")
  arguments = parser.parse_args()
  options = {name: getattr(arguments, name) for name in ("block_size", "draft", "max_new_tokens")}
  Options(**options)
  arguments.output = files.local_path(arguments.output, "--output")
  arguments.data = files.local_path(arguments.data, "--data")
  files.refuse_used(arguments.output, "--output")
  if arguments.response_key == arguments.prompt_key:
    raise UserError(
      f"--response_key and --prompt_key are both {arguments.prompt_key!r}; answers would take the"
      " place of the prompts."
    )
  return arguments


@entry_point
def main():
  arguments = parse()
  schema = read_schema(arguments.data, arguments.prompt_key, arguments.response_key)
  score = scoring.choose(arguments.scorer, schema.names) if arguments.scorer else None
  model = loading.load(arguments.model, dtype=arguments.dtype)
  model.require_tokenizer()
  with files.new_file(arguments.output) as temporary:
    counts = write(model, arguments, schema, score, temporary)
  print(f"{arguments.output}: " + ", ".join(f"{n} {reason}" for reason, n in counts.most_common()))


def write(model, arguments, schema, score, output: Path) -> collections.Counter:
  """Writes all rows with the model's answers, and counts what was done.

  Raises:
    UserError: no row can be answered.
  """
  wanted = [n for n in schema.names if n in (arguments.prompt_key, *scoring.COLUMNS)]
  rows = itertools.chain.from_iterable(piece for _, piece in parquet.rows(arguments.data, wanted))
  counts, named = collections.Counter(), []
  with (
    pyarrow.parquet.ParquetFile(arguments.data) as file,
    pyarrow.parquet.ParquetWriter(output, schema) as writer,
    tqdm(total=file.metadata.num_rows, unit="row") as bar,
  ):
    first = 0
    for batch in file.iter_batches(arguments.batch_size * _BATCHES_A_CALL):
      part = list(itertools.islice(rows, batch.num_rows))
      answers, done, bad = relabel(model, part, arguments, score)
      writer.write_batch(with_responses(batch, schema, arguments.response_key, answers))
      counts.update(done)
      named += [f"{arguments.data}, row {first + i} (from 0): {bad[i]}" for i in sorted(bad)]
      first += batch.num_rows
      bar.update(batch.num_rows)
  for text in named[:_NAMED]:
    print(f"kept: {text}", file=sys.stderr)
  if len(named) > _NAMED:
    print(f"kept: {len(named) - _NAMED} rows more", file=sys.stderr)
  if first and counts["kept: cannot be answered"] == first:
    raise UserError(f"No prompt can be answered, so nothing was written. {named[0]}")
  return counts


if __name__ == "__main__":
  main()
