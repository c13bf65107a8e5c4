"""Files of rows to tokenised examples, made once and cached under a fingerprint."""

import datetime
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from refine_jax.config import DataConfig
from refine_jax.data import parquet, store
from refine_jax.data.store import Examples
from refine_jax.errors import UserError
from refine_jax.files import local_path
from refine_jax.text import chat, template
from refine_jax.text.tokenizer import Tokenizer, TokenizerError, encode
from refine_jax.text.vocabulary import check_ids, first_outside

# Part of the fingerprint: raise it with every change to what a row becomes.
_FORMAT = 3
_FOOTER_BYTES = 1 << 16
# A larger share of bad rows is a wrong column or template, and no run.
MOST_BAD = 0.9
_REASONS, _PLACES = 20, 3
# Not bad: cut away by config.data.truncation.
NOTHING_LEFT = "nothing left of the response"


def load_examples(
  files: str, data: DataConfig, tokenizer: Tokenizer, *, name: str, vocab_size: int
) -> Examples:
  """Tokenises the files, or reads what an earlier run made of them; prints what was kept.

  A row that is no example (null, of another type, refused by the template) is dropped, counted by
  reason, and the first few are named.

  Args:
    files: a path, a glob, or several separated by commas.
    tokenizer: a transformers tokenizer; a fast one works on all cores.
    name: "train" or "val", for the messages.
    vocab_size: rows of the model's embedding.

  Raises:
    UserError: files or columns that are not there, truncation="error" with a long row, more than
      MOST_BAD of the rows bad, a tokenizer without EOS or template, a token id outside the
      vocabulary.
  """
  chat.check_tokenizer(tokenizer, data.chat_template)
  check_ids([tokenizer.eos_token_id], vocab_size, "The tokenizer's EOS", tokenizer)
  paths = parquet.expand(files, f"config.data.{name}_files")
  rows = parquet.count_rows(paths, data.prompt_key, data.response_key)
  place = cache_root(data) / fingerprint(paths, data, tokenizer)

  def build(writer):
    print(f"{name:<13} tokenising {rows} rows of {len(paths)} file(s)", flush=True)
    _tokenise(writer, paths, data, tokenizer)

  examples, known = store.read_or_build(place, build)
  lost = _lost(examples, data)
  print(
    f"{name:<13} {len(examples)} examples, {len(examples.tokens)} tokens{lost};"
    f" {'read from' if known else 'written to'} {place}",
    flush=True,
  )
  named = _named(examples, paths)
  if named:
    print(f"{name:<13} the first dropped, rows from 0: {named}", flush=True)
  bad = sum(n for reason, n in examples.dropped.items() if reason != NOTHING_LEFT)
  if not len(examples) or bad > MOST_BAD * rows:
    what = f"Only {len(examples)} examples are" if len(examples) else "No example is"
    raise UserError(
      f"{what} left of {rows} rows in {files} ({name}){lost}; look at the columns"
      f" {data.prompt_key!r} and {data.response_key!r}. The first dropped: {named or 'none'}."
    )
  _check_vocabulary(examples, paths, tokenizer, vocab_size)
  return examples


def _lost(examples: Examples, data: DataConfig) -> str:
  """What is not trained on, by reason, to follow a number of examples."""
  lost = "".join(f", dropped {n} ({reason})" for reason, n in sorted(examples.dropped.items()))
  if examples.truncated:
    lost += f", truncated {examples.truncated} ({data.truncation})"
  return lost + "".join(f", {n} with {reason}" for reason, n in sorted(examples.noted.items()))


def _named(examples: Examples, paths: list[Path]) -> str:
  """The first dropped rows of each reason."""
  return "; ".join(
    f"{reason}: {', '.join(f'{paths[file]} row {row}' for file, row in places)}"
    for reason, places in sorted(examples.places.items())
  )


def _check_vocabulary(examples: Examples, paths: list[Path], tokenizer, vocab_size: int):
  """Refuses ids without an embedding, in what the cache holds too: the model may be another."""
  index = first_outside(examples.tokens, vocab_size)
  if index is not None:
    example = np.searchsorted(examples.offsets, index, side="right") - 1
    file, row = examples.source_rows[example]
    where = f"{paths[file]}, row {row} (from 0),"
    check_ids(examples.tokens[index : index + 1], vocab_size, where, tokenizer)


def cache_root(data: DataConfig) -> Path:
  """config.data.cache_dir, or REFINE_JAX_CACHE, which comes first, or the user's cache."""
  name = os.environ.get("REFINE_JAX_CACHE") or data.cache_dir
  if name:
    return local_path(name, "config.data.cache_dir or REFINE_JAX_CACHE") / "tokens"
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return local_path(home, "XDG_CACHE_HOME") / "refine_jax" / "tokens"


def fingerprint(paths: list[Path], data: DataConfig, tokenizer: Tokenizer) -> str:
  """A name for all that decides the tokens: files, tokenizer, template, options."""
  digest = hashlib.sha256()

  def add(*values):
    digest.update(json.dumps(values, default=str).encode())

  add(_FORMAT, data.prompt_key, data.response_key, data.max_length, data.truncation)
  add("" if tokenizer.chat_template else data.chat_template, tokenizer.chat_template)
  if template.prints_the_date(tokenizer.chat_template or data.chat_template):
    add(datetime.date.today().isoformat())
  add(tokenizer.eos_token_id, tokenizer.special_tokens_map)  # templates print special tokens
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is not None:
    # Earlier calls leave their truncation and padding in it; ours use neither.
    add(json.loads(backend.to_str()) | {"truncation": None, "padding": None})
  else:
    add(type(tokenizer).__name__, tokenizer.name_or_path, sorted(tokenizer.get_vocab().items()))
  for path in paths:
    try:
      status = path.stat()
      add(str(path.resolve()), status.st_size, status.st_mtime_ns)
      with open(path, "rb") as file:
        # The footer of Parquet holds every row group's sizes and statistics: rewritten files
        # differ in it even where size and time are the same. JSON has none, and is read whole.
        if not parquet.is_json_lines(path):
          file.seek(max(0, status.st_size - _FOOTER_BYTES))
        digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
      raise UserError(f"{path} cannot be read: {error}") from error
  return digest.hexdigest()[:32]


class _Tally:
  """Rows counted by reason, with the first few places of each.

  Reasons quote what is in the rows, so there may be as many as rows; those above _REASONS are
  counted together.
  """

  def __init__(self) -> None:
    self.counts: dict[str, int] = {}
    self.places: dict[str, list[tuple[int, int]]] = {}
    self._file = self._first = 0

  def at(self, file: int, first: int) -> None:
    """Rows that are added from here on are counted from row `first` of a file."""
    self._file, self._first = file, first

  def add(self, reason: str, row: int) -> None:
    if reason not in self.counts and len(self.counts) >= _REASONS:
      reason = "other reasons"
    self.counts[reason] = self.counts.get(reason, 0) + 1
    places = self.places.setdefault(reason, [])
    if len(places) < _PLACES:
      places.append((self._file, self._first + row))


def _tokenise(writer: store.Writer, paths, data: DataConfig, tokenizer):
  dropped, noted, truncated = _Tally(), _Tally(), 0
  for file, path in enumerate(paths):
    for first, prompts, responses in parquet.batches(path, data.prompt_key, data.response_key):
      kept, prompt_lengths, source_rows = [], [], []
      dropped.at(file, first)
      for row, prompt, response in _encode(tokenizer, prompts, responses, data, dropped, noted):
        try:
          ids, prompt_length = fit(prompt, response, data)
        except chat.BadExample as error:
          dropped.add(str(error), row)
          continue
        except UserError as error:
          raise UserError(f"{path}, row {first + row} (from 0): {error}") from error
        truncated += len(ids) < len(prompt) + len(response)
        kept.append(ids)
        prompt_lengths.append(prompt_length)
        source_rows.append((file, first + row))
      writer.append(kept, prompt_lengths, source_rows)
  writer.finish(
    dropped=dropped.counts, truncated=truncated, noted=noted.counts, places=dropped.places
  )


def _encode(tokenizer, prompts, responses, data, dropped: _Tally, noted: _Tally):
  """(row, prompt ids, response ids with EOS) of the good rows of a batch; counts the others."""
  rows, texts = [], []
  for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    try:
      example = chat.example_texts(tokenizer, prompt, response, data.chat_template)
    except chat.BadExample as error:
      dropped.add(str(error), row)
      continue
    for field in example.left_out:
      noted.add(f"{field} of the target left out, which the chat template does not print", row)
    rows.append(row)
    texts.append((example.prompt, example.response))
  for row, ids in zip(rows, _encode_pairs(tokenizer, texts), strict=True):
    if isinstance(ids, TokenizerError):
      dropped.add(str(ids), row)
    else:
      yield row, ids[0], chat.with_eos(ids[1], tokenizer.eos_token_id)


def _encode_pairs(tokenizer, texts: list[tuple[str, str]]) -> list:
  """Both texts' ids for each pair, or the error of the tokenizer."""
  if not texts:
    return []
  try:
    # One call a batch: fast tokenizers spread it over all cores.
    ids = encode(tokenizer, [text for pair in texts for text in pair])
    return list(zip(ids[::2], ids[1::2], strict=True))
  except TokenizerError as error:
    if len(texts) == 1:
      return [error]
    return [result for pair in texts for result in _encode_pairs(tokenizer, [pair])]


def fit(prompt: list[int], response: list[int], data: DataConfig) -> tuple[list[int], int]:
  """Prompt and response within max_length, by config.data.truncation.

  "right" drops the end, EOS with it: a text that was cut has not ended. "left" drops the
  beginning; at least one token stays before the response, to predict its first.

  Returns:
    ids; how many of them are prompt, at least 1.

  Raises:
    BadExample: an empty prompt, or nothing left of the response.
    UserError: too long, and truncation is "error".
  """
  if not prompt:
    raise chat.BadExample("empty prompt")
  ids, excess = prompt + response, len(prompt) + len(response) - data.max_length
  if excess <= 0:
    return ids, len(prompt)
  if data.truncation == "error":
    raise UserError(
      f"{len(ids)} tokens are more than config.data.max_length={data.max_length};"
      " raise it, or set config.data.truncation to left or right."
    )
  if data.truncation == "left":
    return ids[excess:], max(len(prompt) - excess, 1)
  if len(prompt) >= data.max_length:
    raise chat.BadExample(NOTHING_LEFT)
  return ids[: data.max_length], len(prompt)
