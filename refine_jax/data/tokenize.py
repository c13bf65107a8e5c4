"""Tokenised examples, made once and kept on disk as flat arrays.

A cache entry is a directory named by a fingerprint of everything that its content depends on. It
is written beside its final place and renamed, so that a reader sees all of it or nothing.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from refine_jax.config import DataConfig
from refine_jax.data import chat, parquet
from refine_jax.errors import UserError

_FORMAT = 1
_FOOTER_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Examples:
  """Prompts with their responses.

  Attributes:
    tokens: int32, all examples one after the other.
    offsets: int64 [count + 1], where each begins.
    prompt_lengths: int32 [count]; the rest of an example is its response.
    source_rows: int64 [count, 2]: number of the file, row in it.
    dropped: reason -> rows.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  prompt_lengths: np.ndarray
  source_rows: np.ndarray
  dropped: dict[str, int]

  def __len__(self) -> int:
    return len(self.prompt_lengths)

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self.offsets)

  def example(self, index: int) -> np.ndarray:
    """int32 ids, prompt first."""
    return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def load_examples(files: str, data: DataConfig, tokenizer, *, name: str) -> Examples:
  """Tokenises the files, or reads what an earlier run made of them; prints what was kept.

  Args:
    name: "train" or "val", for the messages.

  Raises:
    UserError: files or columns that are not there, truncation="error" with a long row, nothing
      left, a tokenizer without EOS or template.
  """
  chat.check_tokenizer(tokenizer, data.chat_template)
  paths = parquet.expand(files)
  place = cache_root(data) / fingerprint(paths, data, tokenizer)
  examples = _read(place)
  known = examples is not None
  if not known:
    _build(place, paths, data, tokenizer)
    examples = _read(place)
  dropped = "".join(f", dropped {n} ({reason})" for reason, n in sorted(examples.dropped.items()))
  origin = "read from" if known else "written to"
  print(
    f"{name:<13} {len(examples)} examples, {len(examples.tokens)} tokens{dropped};"
    f" {origin} {place}"
  )
  if not len(examples):
    raise UserError(f"No example is left of {files} ({name}){dropped}.")
  return examples


def cache_root(data: DataConfig) -> Path:
  """config.data.cache_dir, or REFINE_JAX_CACHE, which comes first, or the user's cache."""
  name = os.environ.get("REFINE_JAX_CACHE") or data.cache_dir
  if name:
    return Path(name).expanduser() / "tokens"
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(home).expanduser() / "refine_jax" / "tokens"


def fingerprint(paths: list[Path], data: DataConfig, tokenizer) -> str:
  """A name for all that decides the tokens: files, tokenizer, template, options."""
  digest = hashlib.sha256()

  def add(*values):
    digest.update(json.dumps(values).encode())

  add(_FORMAT, data.prompt_key, data.response_key, data.max_length, data.truncation)
  add(data.chat_template, tokenizer.chat_template, tokenizer.eos_token_id)
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is not None:
    add(backend.to_str())
  else:
    add(type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()))
  for path in paths:
    status = path.stat()
    add(str(path.resolve()), status.st_size, status.st_mtime_ns)
    with open(path, "rb") as file:
      # The footer holds every row group's sizes and statistics: rewritten files differ in it
      # even where size and time are the same.
      file.seek(max(0, status.st_size - _FOOTER_BYTES))
      digest.update(file.read())
  return digest.hexdigest()[:32]


def _read(place: Path) -> Examples | None:
  """The entry, or None where there is none or it is damaged."""
  try:
    stats = json.loads((place / "stats.json").read_text(encoding="utf-8"))
    count, tokens = stats["examples"], stats["tokens"]
    arrays = {
      name: _memory_map(place / f"{name}.bin", dtype, shape)
      for name, dtype, shape in (
        ("tokens", np.int32, (tokens,)),
        ("offsets", np.int64, (count + 1,)),
        ("prompt_lengths", np.int32, (count,)),
        ("source_rows", np.int64, (count, 2)),
      )
    }
  except (OSError, ValueError, KeyError):
    return None
  return Examples(dropped=stats["dropped"], **arrays)


def _memory_map(path, dtype, shape):
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  if path.stat().st_size != size:
    raise ValueError(f"{path} has the wrong size")
  return np.memmap(path, dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype)


def _build(place: Path, paths, data: DataConfig, tokenizer):
  temporary = place.with_name(f"{place.name}.{os.getpid()}.new")
  try:
    temporary.mkdir(parents=True)
    _write(temporary, paths, data, tokenizer)
    if place.exists():  # damaged, or made meanwhile by another process: ours is whole
      shutil.rmtree(place, ignore_errors=True)
    try:
      temporary.rename(place)
    except OSError:
      if _read(place) is None:  # not just another process that was faster
        raise
  except OSError as error:
    raise UserError(f"The token cache {temporary} cannot be written: {error}") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write(directory: Path, paths, data: DataConfig, tokenizer):
  dropped = collections.Counter()
  count, total = 0, 0
  with (
    open(directory / "tokens.bin", "wb") as tokens,
    open(directory / "offsets.bin", "wb") as offsets,
    open(directory / "prompt_lengths.bin", "wb") as prompt_lengths,
    open(directory / "source_rows.bin", "wb") as source_rows,
  ):
    offsets.write(np.int64(0).tobytes())
    for file_number, path in enumerate(paths):
      for first, prompts, responses in parquet.batches(path, data.prompt_key, data.response_key):
        for row, prompt, response in _encode(tokenizer, prompts, responses, data, dropped):
          try:
            ids, prompt_length = fit(prompt, response, data)
          except chat.BadExample as error:
            dropped[str(error)] += 1
            continue
          except UserError as error:
            raise UserError(f"{path}, row {first + row}: {error}") from error
          total += len(ids)
          count += 1
          tokens.write(np.asarray(ids, np.int32).tobytes())
          offsets.write(np.int64(total).tobytes())
          prompt_lengths.write(np.int32(prompt_length).tobytes())
          source_rows.write(np.array([file_number, first + row], np.int64).tobytes())
  stats = {"examples": count, "tokens": total, "dropped": dict(dropped)}
  (directory / "stats.json").write_text(json.dumps(stats), encoding="utf-8")


def _encode(tokenizer, prompts, responses, data, dropped):
  """(row, prompt ids, response ids with EOS) of the good rows of a batch."""
  rows, prompt_texts, response_texts = [], [], []
  for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    try:
      prompt_text = chat.prompt_text(tokenizer, prompt, data.chat_template)
      response_text = chat.response_text(response, prompt_text)
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
