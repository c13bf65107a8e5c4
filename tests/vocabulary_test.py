"""Token ids outside the model's embedding: one message, wherever ids come from."""

import types
from pathlib import Path

import data_fixtures
import numpy as np
import pytest
import train_fixtures
from data_fixtures import make_tokenizer, write_parquet

from configs import base
from refine_jax import data
from refine_jax.config import from_config_dict
from refine_jax.decoding import generation, loading
from refine_jax.errors import UserError
from refine_jax.text.vocabulary import check_ids
from refine_jax.training import startup

VOCABULARY = 369  # of make_tokenizer, without the token that is added below
MESSAGE = r"token id 369 \('<tool>'\), which is outside the model's vocabulary of 369"


@pytest.fixture
def tokenizer():
  result = make_tokenizer()
  assert len(result) == VOCABULARY
  result.add_tokens(["<tool>"])
  return result


@pytest.fixture
def model(tokenizer):
  """Has no parameters: what is checked comes before they are needed."""
  config = train_fixtures.tiny_config(vocab_size=VOCABULARY)
  result = loading.Model(config, {}, tokenizer, (1,), None, Path("tiny"))
  result.__dict__["cache_engine"] = "xla"
  return result


@pytest.mark.parametrize("ids", [[], [0, 368], np.array([[0], [368]]), np.array([], np.int32)])
def test_ids_of_the_vocabulary_pass(ids):
  check_ids(ids, VOCABULARY, "It")


@pytest.mark.parametrize("token_id", [-1, 369, 2**31, 2**70])
def test_the_first_id_outside_is_named(token_id):
  with pytest.raises(UserError, match=f"It has token id {token_id}, .*of 369"):
    check_ids([5, token_id, 999], VOCABULARY, "It")


@pytest.mark.parametrize("value", [None, "a", 1.5, [3]])
def test_what_is_no_id_is_named(value):
  with pytest.raises(UserError, match="It has .*, which is no token id"):
    check_ids([5, value], VOCABULARY, "It")


@pytest.mark.parametrize("prompt", ["say <tool>", [5, 369], np.array([5, 369])])
def test_a_prompt_of_text_or_ids_is_checked(model, prompt):
  with pytest.raises(UserError, match=f"Prompt 2 has {MESSAGE}"):
    generation.generate(model, [[5], prompt])


@pytest.mark.parametrize(
  "option", [{"noise_token": 369}, {"eos_token_id": [1, 369]}, {"stop": ["<tool>"]}]
)
def test_special_tokens_of_a_generation_are_checked(tokenizer, model, option):
  tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
  with pytest.raises(UserError, match=f"{next(iter(option))} has {MESSAGE}"):
    generation.generate(model, [[5]], **option)


def test_iterative_generate_and_whole_sequences_are_checked(model):
  with pytest.raises(UserError, match=MESSAGE):
    generation.iterative_generate(model, [[5, 369]])
  with pytest.raises(UserError, match=MESSAGE):
    model([[5, 369]])


def test_tokenised_data_is_checked_and_names_the_row_from_the_cache_too(tmp_path, tokenizer):
  file = write_parquet(tmp_path / "a.parquet", ["a", None, "b"], ["x", "y", "say <tool>"])
  assert len(data_fixtures.load(file, tokenizer)) == 2  # for a model with that row
  for _ in range(2):
    with pytest.raises(UserError, match=rf"a.parquet, row 2 \(from 0\), has {MESSAGE}"):
      data.load_examples(
        file, data_fixtures.data_config(), tokenizer, name="train", vocab_size=VOCABULARY
      )


def test_an_eos_outside_is_found_before_the_data_is_read(tmp_path, capsys):
  tokenizer = make_tokenizer(eos="</s>")  # not in the vocabulary, so that transformers adds it
  file = write_parquet(tmp_path / "a.parquet", ["a"], ["x"])
  with pytest.raises(UserError, match=r"EOS has token id 369 \('</s>'\)"):
    data.load_examples(
      file, data_fixtures.data_config(), tokenizer, name="train", vocab_size=VOCABULARY
    )
  assert "tokenising" not in capsys.readouterr().out


@pytest.mark.parametrize("noise", [-1, 369])
def test_noise_and_eos_of_a_training_are_checked(tokenizer, noise):
  raw = base.get_config()
  raw.data.train_files, raw.model.config, raw.noise.token = "a", "b", noise
  tokenizer.eos_token = "<tool>" if noise == -1 else tokenizer.eos_token
  source = types.SimpleNamespace(
    tokenizer=tokenizer, model=types.SimpleNamespace(vocab_size=VOCABULARY)
  )
  with pytest.raises(UserError, match=f"config.noise.token has {MESSAGE}"):
    startup.make_step_config(from_config_dict(raw), source, types.SimpleNamespace(total_steps=1))


def test_requests_of_the_harness_are_checked(tokenizer, model):
  lm_eval = pytest.importorskip("refine_jax.evaluation.lm_eval")
  adapter = types.SimpleNamespace(model=model, tokenizer=tokenizer, batch_size=1)
  with pytest.raises(UserError, match=f"Request 2 has {MESSAGE}"):
    lm_eval.RefineLM._loglikelihood_tokens(adapter, [(None, [1], [2]), (None, [1], [369])])
