"""Tokenizers: loaded as their files say, and called so that their errors are one line."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_jax.errors import UserError
from refine_jax.quoting import cut, reason

# transformers' PreTrainedTokenizerBase, which takes seconds to import; its attributes are annotated
# as unions of all that any tokenizer may have.
Tokenizer = Any

# What decides the ids of a text and the text of ids; special tokens are not among it, because
# tokenizer_config.json may add some.
_PARTS = ("normalizer", "pre_tokenizer", "model", "decoder")


class TokenizerError(UserError):
  """What the tokenizer library fails on."""


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
  """Everything that the libraries raise in the block, as one line that begins with `what`.

  Raises:
    TokenizerError: of any error but those of the user and of the system.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    raise TokenizerError(f"{what}: {reason(error)}") from error
  except BaseException as error:
    # A panic of Rust, which its bindings keep from `except Exception`.
    if type(error).__name__ != "PanicException":
      raise
    raise TokenizerError(f"{what}: {reason(error)}") from error


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
  """The tokenizer of a directory or hub name.

  It does what its tokenizer.json says, where it has one. transformers builds some classes of
  tokenizers anew instead, with the normaliser, pre-tokenizer and decoder of the class.

  Raises:
    UserError: there is none, or its files are damaged.
  """
  # It advises to install PyTorch, which nothing here needs.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  name = str(name)
  with library_errors(f"{cut(name)!r} has no tokenizer that can be loaded"):
    if name.startswith((".", "/", "~")):
      name = str(Path(name).expanduser())
      if not Path(name).is_dir():
        raise UserError(f"{cut(name)} (the tokenizer) is not a directory.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      name, trust_remote_code=trust_remote_code
    )
    parts = _differing_parts(tokenizer, name)
    if parts:
      # The base class reads tokenizer.json as it is.
      tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
      parts = _differing_parts(tokenizer, name)
    if parts:
      raise UserError(
        f"transformers makes another {', '.join(parts)} of {name} than its tokenizer.json has;"
        " use another version of transformers."
      )
    _try(tokenizer)
  return tokenizer


def _differing_parts(tokenizer, name: str) -> list[str]:
  """The parts of a tokenizer that are not those of its tokenizer.json."""
  backend = getattr(tokenizer, "backend_tokenizer", None)
  # Code that came with the model may do as it likes: the user trusts it.
  if backend is None or not type(tokenizer).__module__.startswith("transformers."):
    return []
  import tokenizers
  from transformers.utils.hub import cached_file

  path = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
  if path is None:
    return []
  file = tokenizers.Tokenizer.from_file(path)
  return [part for part in _PARTS if _state(getattr(backend, part)) != _state(getattr(file, part))]


def _state(part) -> bytes | None:
  """The part as the library writes it, which is the same for what was read from other spellings."""
  return None if part is None else part.__getstate__()


def _try(tokenizer):
  """Uses all that is used later, so that damaged files show when they are read."""
  kinds = {"eos_token": str, "bos_token": str, "eos_token_id": int, "bos_token_id": int}
  for attribute, kind in kinds.items():
    value = getattr(tokenizer, attribute)
    if value is not None and type(value) is not kind:
      raise ValueError(f"{attribute} is {value!r}")
  if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
    raise ValueError(f"chat_template is {tokenizer.chat_template!r}")
  json.dumps([tokenizer.special_tokens_map, tokenizer.chat_template], default=str)
  ids = encode(tokenizer, ["a b"])[0]
  tokenizer.decode(ids, skip_special_tokens=True)
  tokenizer.convert_ids_to_tokens(ids)
  {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def encode(
  tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
  """Ids of texts, in parallel where the tokenizer is a fast one.

  Args:
    add_special_tokens: False for texts that hold them already, as a chat template writes them.

  Raises:
    TokenizerError: what the tokenizer fails on, such as a text with a word that it lacks.
  """
  with library_errors("The tokenizer fails"):
    # Not verbose: the tokenizer would warn of texts beyond its own limit, which we truncate.
    return tokenizer(
      texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )["input_ids"]


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
  """What the tokenizer puts before a text by itself, such as BOS.

  What it puts after one (EOS, SEP) has no place before a continuation, which begins where its
  text's ids end.
  """
  bare, whole = (encode(tokenizer, ["a"], add_special_tokens=s)[0] for s in (False, True))
  starts = range(len(whole) - len(bare) + 1)
  return whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)]


def encode_start(tokenizer: Tokenizer, text: str, prefix: list[int]) -> list[int]:
  """Ids of a text that something begins with: after `prefix_ids`, unless it has BOS already."""
  bos = tokenizer.bos_token
  ids = encode(tokenizer, [text])[0]
  return ids if bos and text.startswith(bos) else [*prefix, *ids]
