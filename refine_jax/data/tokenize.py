"""Parquet files to tokenised examples, made once and cached under a fingerprint."""

import collections
import hashlib
import json
import os
from pathlib import Path

from refine_jax.config import DataConfig
from refine_jax.data import parquet, store
from refine_jax.data.store import Examples
from refine_jax.errors import UserError
from refine_jax.files import local_path
from refine_jax.text import chat

# Part of the fingerprint: raise it with every change to what a row becomes.
_FORMAT = 2
_FOOTER_BYTES = 1 << 16


def load_examples(files: str, data: DataConfig, tokenizer, *, name: str) -> Examples:
  """Tokenises the files, or reads what an earlier run made of them; prints what was kept.

  Args:
    files: a path, a glob, or several separated by commas.
    tokenizer: a transformers tokenizer; a fast one works on all cores.
    name: "train" or "val", for the messages.

  Raises:
    UserError: files or columns that are not there, truncation="error" with a long row, nothing
      left, a tokenizer without EOS or template.
  """
  chat.check_tokenizer(tokenizer, data.chat_template)
  paths = parquet.expand(files, f"config.data.{name}_files")
  rows = parquet.count_rows(paths, data.prompt_key, data.response_key)
  place = cache_root(data) / fingerprint(paths, data, tokenizer)

  def build(writer):
    print(f"{name:<13} tokenising {rows} rows of {len(paths)} file(s)", flush=True)
    _tokenise(writer, paths, data, tokenizer)

  examples, known = store.read_or_build(place, build)
  lost = "".join(f", dropped {n} ({reason})" for reason, n in sorted(examples.dropped.items()))
  if examples.truncated:
    lost += f", truncated {examples.truncated} ({data.truncation})"
  print(
    f"{name:<13} {len(examples)} examples, {len(examples.tokens)} tokens{lost};"
    f" {'read from' if known else 'written to'} {place}",
    flush=True,
  )
  if not len(examples):
    raise UserError(
      f"No example is left of {rows} rows in {files} ({name}){lost}; look at the columns"
      f" {data.prompt_key!r} and {data.response_key!r}."
    )
  return examples


def cache_root(data: DataConfig) -> Path:
  """config.data.cache_dir, or REFINE_JAX_CACHE, which comes first, or the user's cache."""
  name = os.environ.get("REFINE_JAX_CACHE") or data.cache_dir
  if name:
    return local_path(name, "config.data.cache_dir or REFINE_JAX_CACHE") / "tokens"
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return local_path(home, "XDG_CACHE_HOME") / "refine_jax" / "tokens"


def fingerprint(paths: list[Path], data: DataConfig, tokenizer) -> str:
  """A name for all that decides the tokens: files, tokenizer, template, options."""
  digest = hashlib.sha256()

  def add(*values):
    digest.update(json.dumps(values, default=str).encode())

  add(_FORMAT, data.prompt_key, data.response_key, data.max_length, data.truncation)
  add("" if tokenizer.chat_template else data.chat_template, tokenizer.chat_template)
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
        # The footer holds every row group's sizes and statistics: rewritten files differ in it
        # even where size and time are the same.
        file.seek(max(0, status.st_size - _FOOTER_BYTES))
        digest.update(file.read())
    except OSError as error:
      raise UserError(f"{path} cannot be read: {error}") from error
  return digest.hexdigest()[:32]


def _tokenise(writer: store.Writer, paths, data: DataConfig, tokenizer):
  dropped, truncated = collections.Counter(), 0
  for file_number, path in enumerate(paths):
    for first, prompts, responses in parquet.batches(path, data.prompt_key, data.response_key):
      kept, prompt_lengths, source_rows = [], [], []
      for row, prompt, response in _encode(tokenizer, prompts, responses, data, dropped):
        try:
          ids, prompt_length = fit(prompt, response, data)
        except chat.BadExample as error:
          dropped[str(error)] += 1
          continue
        except UserError as error:
          raise UserError(f"{path}, row {first + row} (from 0): {error}") from error
        truncated += len(ids) < len(prompt) + len(response)
        kept.append(ids)
        prompt_lengths.append(prompt_length)
        source_rows.append((file_number, first + row))
      writer.append(kept, prompt_lengths, source_rows)
  writer.finish(dropped=dict(dropped), truncated=truncated)


def _encode(tokenizer, prompts, responses, data, dropped):
  """(row, prompt ids, response ids with EOS) of the good rows of a batch."""
  rows, prompt_texts, response_texts = [], [], []
  for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    try:
      prompt_text = chat.prompt_text(tokenizer, prompt, data.chat_template)
      response_text = chat.response_text(response, prompt_text, tokenizer.eos_token)
    except chat.BadExample as error:
      dropped[str(error)] += 1
      continue
    rows.append(row)
    prompt_texts.append(prompt_text)
    response_texts.append(response_text)
  if not rows:
    return
  # One call a batch: fast tokenizers spread it over all cores.
  prompt_ids = chat.encode(tokenizer, prompt_texts)
  response_ids = chat.encode(tokenizer, response_texts)
  for row, prompt, response in zip(rows, prompt_ids, response_ids, strict=True):
    yield row, prompt, chat.with_eos(response, tokenizer.eos_token_id)


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
    raise chat.BadExample("nothing left of the response")
  return ids[: data.max_length], len(prompt)
