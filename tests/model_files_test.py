"""The files next to the weights: tokenizer as in the source, ends of answers, the record."""

import json
import shutil

import data_fixtures
import pytest
import transformers
from hf_fixtures import tiny_hf_model, words_tokenizer

from refine_jax.decoding import loading
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import export as hf_export
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.generation_config import Refinement, read_generation_config
from refine_jax.hf.model_files import save_model_files, save_tokenizer
from refine_jax.text.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
RECORD = {"noise_token": 1, "block_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A model with tokenizer files as transformers 4 wrote them, and no chat template."""
  tokenizer = data_fixtures.make_tokenizer()
  directory, _ = tiny_hf_model(
    "qwen2",
    tmp_path_factory.mktemp("source"),
    vocab_size=len(tokenizer),
    eos_token_id=1,
    bos_token_id=None,
    pad_token_id=0,
  )
  tokenizer.save_pretrained(directory)
  (directory / "chat_template.jinja").unlink()
  special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
  names = enumerate(("<|pad|>", "<|end|>", "<|start|>"))
  settings = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "additional_special_tokens": ["<|start|>"],
    "added_tokens_decoder": {str(i): {"content": t, "special": True} | special for i, t in names},
  }
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))
  (directory / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
  (directory / "vocab.json").write_text("{}")
  return directory


@pytest.fixture
def directory(source, tmp_path):
  return shutil.copytree(source, tmp_path / "model")


def test_tokenizer_files_are_those_of_the_source_byte_for_byte(directory, tmp_path):
  (directory / "chat_template.jinja").write_text(TEMPLATE)
  (directory / "additional_chat_templates").mkdir()
  (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
  tokenizer = load_tokenizer(directory)
  save_model_files(directory, tokenizer, tmp_path / "files", chat_template="never used")
  params = hf_weights.load_params(directory, hf_config.read_model_config(directory))
  hf_export.export(params, tmp_path / "files", tmp_path / "out")
  for output in (tmp_path / "files", tmp_path / "out"):
    for name in (
      "tokenizer.json",
      "tokenizer_config.json",
      "special_tokens_map.json",
      "vocab.json",
      "chat_template.jinja",
      "additional_chat_templates/tools.jinja",
    ):
      assert (output / name).read_bytes() == (directory / name).read_bytes(), name


def test_a_template_that_the_user_gave_is_the_only_change(directory, tmp_path):
  (directory / "chat_template.jinja").write_text("")  # goes before tokenizer_config.json
  tokenizer = load_tokenizer(directory)
  save_model_files(directory, tokenizer, tmp_path / "files", chat_template=TEMPLATE)
  before = json.loads((directory / "tokenizer_config.json").read_text())
  after = json.loads((tmp_path / "files" / "tokenizer_config.json").read_text())
  assert after == before | {"chat_template": TEMPLATE}
  assert load_tokenizer(tmp_path / "files").chat_template == TEMPLATE


def test_a_tokenizer_of_another_directory_brings_its_own_files(directory, tmp_path):
  other, _ = tiny_hf_model("llama", tmp_path)
  save_tokenizer(words_tokenizer(), other)
  save_model_files(directory, load_tokenizer(other), tmp_path / "files")
  written = (tmp_path / "files" / "tokenizer.json").read_bytes()
  assert written == (other / "tokenizer.json").read_bytes()
  assert not (tmp_path / "files" / "vocab.json").exists()


def test_a_tokenizer_made_in_python_is_written_in_words_of_transformers_4_too(tmp_path):
  made = words_tokenizer()
  made.add_special_tokens({"additional_special_tokens": ["w7"]})
  made.chat_template = TEMPLATE
  save_tokenizer(made, tmp_path)
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert settings["additional_special_tokens"] == ["w7"]
  assert settings["chat_template"] == TEMPLATE
  assert not {"backend", "extra_special_tokens"} & settings.keys()
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert loaded("w5 w7")["input_ids"] == made("w5 w7")["input_ids"]
  assert loaded.all_special_ids == made.all_special_ids


def test_a_tokenizer_that_transformers_5_wrote_is_copied_in_words_of_4_too(tmp_path):
  made = words_tokenizer()
  made.add_special_tokens({"additional_special_tokens": ["w7"]})
  directory, _ = tiny_hf_model("llama", tmp_path)
  made.save_pretrained(directory)
  save_model_files(directory, load_tokenizer(directory), tmp_path / "files")
  settings = json.loads((tmp_path / "files" / "tokenizer_config.json").read_text())
  assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert settings["additional_special_tokens"] == ["w7"]
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "files")
  assert loaded.all_special_ids == made.all_special_ids


def test_an_export_holds_no_weights_but_its_own(directory, tmp_path):
  for name in ("model.safetensors.index.json", "pytorch_model.bin", "model.gguf", "old.pt"):
    (directory / name).write_text("{}")
  params = hf_weights.load_params(directory, hf_config.read_model_config(directory))
  output = hf_export.export(params, directory, tmp_path / "out")
  names = {p.name for p in output.iterdir()}
  assert "model.safetensors" in names and "config.json" in names
  assert not {"model.safetensors.index.json", "pytorch_model.bin", "model.gguf", "old.pt"} & names


def generation(directory, **values):
  (directory / "generation_config.json").write_text(json.dumps(values))
  return read_generation_config(directory, hf_config.read_model_config(directory))


def test_the_record_of_a_training_is_read_back(directory, tmp_path):
  save_model_files(directory, None, tmp_path / "none", refinement=RECORD)
  tokenizer = load_tokenizer(directory)
  save_model_files(directory, tokenizer, tmp_path / "files", refinement=RECORD)
  shape = hf_config.read_model_config(directory)
  found = read_generation_config(tmp_path / "files", shape)
  assert found.refinement == Refinement(**RECORD) and found.eos_token_ids == (1,)
  # transformers would make a file with this mark anew from config.json.
  written = json.loads((tmp_path / "files" / "generation_config.json").read_text())
  assert "_from_model_config" not in written


def test_keys_of_a_later_version_are_left_alone(directory):
  found = generation(directory, refinement=RECORD | {"gate": [1, 2], "version": 9}, top_p=0.5)
  assert found.refinement == Refinement(**RECORD)


@pytest.mark.parametrize(
  ("values", "named"),
  [
    ({"eos_token_id": "<eos>"}, "eos_token_id"),
    ({"eos_token_id": [1, None]}, "eos_token_id"),
    ({"eos_token_id": True}, "eos_token_id"),
    ({"eos_token_id": 1.0}, "eos_token_id"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ({"eos_token_id": -2}, "eos_token_id"),
    ({"eos_token_id": [1, 10**6]}, "1000000, which is outside the model's vocabulary"),
    ({"pad_token_id": [1]}, "pad_token_id"),
    ({"pad_token_id": "x"}, "pad_token_id"),
    ({"refinement": []}, "refinement"),
    ({"refinement": 0}, "refinement"),
    ({"refinement": {}}, "noise_token"),
    ({"refinement": {"noise_token": 10**6}}, "noise_token"),
    ({"refinement": {"noise_token": "1"}}, "noise_token"),
    ({"refinement": {"noise_token": 1, "block_size": 0}}, "block_size"),
    ({"refinement": {"noise_token": 1, "block_size": 2**31}}, "block_size"),
    ({"refinement": {"noise_token": 1, "block_size": "4"}}, "block_size"),
  ],
)
def test_wrong_types_and_ids_are_one_line_that_names_the_key(values, named, directory):
  with pytest.raises(UserError, match=named) as error:
    generation(directory, **values)
  assert "generation_config.json" in str(error.value)


def test_null_is_absent_and_minus_one_is_no_padding(directory):
  found = generation(directory, eos_token_id=None, pad_token_id=-1, refinement=None)
  assert found.eos_token_ids == (1,)  # config.json's
  assert found.pad_token_id is None and found.refinement is None


def test_a_loaded_model_has_what_the_files_say(directory):
  generation(directory, eos_token_id=[1, 2], pad_token_id=3, refinement=RECORD)
  model = loading.load(directory)
  assert (model.eos_token_ids, model.pad_token_id) == ((1, 2), 3)
  assert model.refinement == Refinement(**RECORD)
