"""Models for the tests of decoding: a copier, and one that has a tokenizer."""

import json

import data_fixtures
import jax
import numpy as np
import train_fixtures as tiny
from hf_fixtures import tiny_hf_model

from refine_jax import loading


def copier_model(tokenizer=None, vocabulary: int = 40):
  """A trained-like model: after token i comes i + 1, whatever was before, so drafts verify."""
  config = tiny.tiny_config(vocab_size=vocabulary, tied_head=False, width=64)
  params = tiny.tiny_params(config)
  embedding = np.asarray(jax.random.normal(jax.random.key(0), (vocabulary, 64)))
  params["embedding"] = embedding
  params["head"] = np.roll(embedding, 1, axis=0)  # the logit of i + 1 is i's own embedding
  params["layers"] = jax.tree.map(lambda x: x * 0, params["layers"])
  return loading.Model(config, params, tokenizer, (vocabulary - 1,), None, "copier")


def text_model_directory(place, family: str = "llama"):
  """A Hugging Face directory of a tiny random model with a tokenizer and a chat template."""
  tokenizer = data_fixtures.make_tokenizer()
  directory, _ = tiny_hf_model(
    family, place, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
  )  # fmt: skip
  tokenizer.save_pretrained(directory)
  assert json.loads((directory / "config.json").read_text())["vocab_size"] == len(tokenizer)
  return directory
