"""What an export needs besides weights: config.json, generation_config.json, the tokenizer's files.

The tokenizer's files are those of its source, byte for byte, where the run changed nothing and
transformers 4 can read them: of what transformers 5 writes, 4 and readers built on it may not.
"""

import os
import shutil
from pathlib import Path

from refine_jax import files
from refine_jax.hf.config import read_json
from refine_jax.hf.generation_config import NAME, describe_generation
from refine_jax.hf.weights import find
from refine_jax.text.tokenizer import Tokenizer

_MODEL_FILES = ("config.json", NAME)
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Beside those that a tokenizer's class names itself.
_TOKENIZER_FILES = (
  "tokenizer.json",
  _TOKENIZER_CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  # What a class of transformers reads besides, or in place of, tokenizer.json.
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
)
TEMPLATE_FOLDER = "additional_chat_templates"
# What `model.generate(custom_generate=DIR, trust_remote_code=True)` of transformers runs.
CUSTOM_GENERATE = "custom_generate"


def save_model_files(
  directory: str | Path,
  tokenizer: Tokenizer,
  output: Path,
  *,
  chat_template: str = "",
  refinement: dict | None = None,
) -> None:
  """Writes what an export needs besides weights; an `output` that is there already stays as it is.

  Args:
    directory: of the model.
    tokenizer: None where there is none.
    chat_template: for a tokenizer that has none: what it was trained with is what it is used with.
    refinement: what the sampler should know of the training (generation_config.Refinement).

  Raises:
    UserError: the tokenizer's files or generation_config.json cannot be read, or written.
  """
  if output.exists():
    return
  source = Path(directory)
  with files.new_directory(output) as temporary:
    for name in _MODEL_FILES:
      if (source / name).exists():
        shutil.copyfile(source / name, temporary / name)
    if tokenizer is None:
      return
    _copy_tokenizer(tokenizer, temporary)
    if chat_template and not tokenizer.chat_template:
      _set_template(temporary, chat_template)
    config = describe_generation(source, tokenizer.eos_token_id, refinement)
    if config:
      files.write_json(temporary / NAME, config)


def _copy_tokenizer(tokenizer, output: Path) -> None:
  """The files that it was loaded from, or new ones where it was made in Python or by own code."""
  source = tokenizer.name_or_path
  # Code of its own is spread over files that only transformers knows to gather.
  if not source or getattr(tokenizer, "_auto_class", None) is not None:
    save_tokenizer(tokenizer, output)
    return
  source = find(str(source), weights=False)
  names = {*_TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}
  for name in sorted(n for n in names if os.path.isfile(source / n)):
    shutil.copyfile(source / name, output / name)
  if (source / TEMPLATE_FOLDER).is_dir():
    shutil.copytree(source / TEMPLATE_FOLDER, output / TEMPLATE_FOLDER)
  if (output / _TOKENIZER_CONFIG).exists():
    settings = read_json(output, _TOKENIZER_CONFIG)
    readable = _spelled_for_both(settings)
    if readable != settings:
      files.write_json(output / _TOKENIZER_CONFIG, readable)


def add_custom_generate(output: Path) -> None:
  """Puts PyTorch code for parallel decoding into a release."""
  source = Path(__file__).parent / CUSTOM_GENERATE
  (output / CUSTOM_GENERATE).mkdir()
  for path in sorted(source.glob("*.py")):
    shutil.copyfile(path, output / CUSTOM_GENERATE / path.name)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
  """Writes a tokenizer's files so that transformers 4 and 5 both load them.

  Both read chat_template in tokenizer_config.json.
  """
  tokenizer.save_pretrained(directory)
  settings = _spelled_for_both(read_json(directory, _TOKENIZER_CONFIG))
  settings.pop("backend", None)
  if isinstance(tokenizer.chat_template, str):
    settings["chat_template"] = tokenizer.chat_template
  files.write_json(directory / _TOKENIZER_CONFIG, settings)


def _spelled_for_both(settings: dict) -> dict:
  """A tokenizer_config.json without what transformers 5 alone reads.

  5 names a class that 4 has not, and lists as `extra_special_tokens` what 4 calls
  `additional_special_tokens`.
  """
  settings = dict(settings)
  if isinstance(settings.get("extra_special_tokens"), list):
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
  if settings.get("tokenizer_class") == "TokenizersBackend":
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  return settings


def _set_template(directory: Path, template: str) -> None:
  """In tokenizer_config.json, which every reader knows, and in the file that goes before it."""
  first = directory / "chat_template.jinja"
  if first.exists():
    first.write_text(template, encoding="utf-8")
  path = directory / _TOKENIZER_CONFIG
  settings = read_json(directory, path.name) if path.exists() else {}
  files.write_json(path, settings | {"chat_template": template})
