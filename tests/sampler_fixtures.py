"""Models and prompts for the tests of decoding, and transformers' greedy answers."""

import functools
import json

import data_fixtures
import jax
import numpy as np
import torch
import train_fixtures as tiny
from hf_fixtures import tiny_hf_model

from refine_jax.decoding import loading, state
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import Request

EOS = 2


def copier_model(tokenizer=None, vocabulary: int = 40):
  """A trained-like model: after token i comes i + 1, whatever was before, so drafts verify."""
  config = tiny.tiny_config(vocab_size=vocabulary, tied_head=False, width=64)
  params = tiny.tiny_params(config)
  embedding = np.asarray(jax.random.normal(jax.random.key(0), (vocabulary, 64)))
  params["embedding"] = embedding
  params["head"] = np.roll(embedding, 1, axis=0)  # the logit of i + 1 is i's own embedding
  params["layers"] = jax.tree.map(lambda x: x * 0, params["layers"])
  return loading.Model(config, params, tokenizer, (vocabulary - 1,), None, "copier")


def directory_for(tokenizer, place, family: str, **changes):
  """A Hugging Face directory of a tiny random model for a tokenizer, which is not written."""
  directory, _ = tiny_hf_model(
    family,
    place,
    vocab_size=len(tokenizer),
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    bos_token_id=None,
    **changes,
  )
  return directory


def text_model_directory(place, family: str = "llama"):
  """A Hugging Face directory of a tiny random model with a tokenizer and a chat template."""
  tokenizer = data_fixtures.make_tokenizer()
  directory = directory_for(tokenizer, place, family)
  tokenizer.save_pretrained(directory)
  assert json.loads((directory / "config.json").read_text())["vocab_size"] == len(tokenizer)
  return directory


def unequal_prompts(count, vocabulary, seed=0):
  """Prompts of unequal lengths, some with EOS inside and one ending in it."""
  rng = np.random.default_rng(seed)
  rows = [rng.integers(0, vocabulary, rng.integers(1, 12)).tolist() for _ in range(count)]
  for row in rows[::2]:
    row[len(row) // 2] = EOS
  rows[-1][-1] = EOS
  return rows


def greedy(theirs, prompt, new):
  """Transformers' greedy continuation of one prompt."""
  ids = torch.tensor([prompt])
  with torch.no_grad():
    out = theirs.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=new,
      do_sample=False,
      eos_token_id=EOS,
      pad_token_id=0,
    )
  return out[0, len(prompt) :].tolist()


def entered(
  params, config, settings, prompts, *, size, new, noise=0, eos=(), enter=None, **options
):
  """The State of rows whose prompts are in the cache, each by a piece of 16 tokens.

  Args:
    new: tokens of each row's answer.
    enter: state.enter, or a function that gives what it gives.
    options: of all rows (Options), with a seed of its own for each.
  """
  rows, dtype = len(prompts), jax.tree.leaves(params["layers"][0])[0].dtype
  pieces = state.empty_pieces(settings, rows, rows, 16)
  for row, prompt in enumerate(prompts):
    request = Request(list(prompt), Options(**options), row, False, noise, tuple(eos), ())
    for column, value in (
      (pieces.slot, row),
      (pieces.count, len(prompt)),
      (pieces.last, True),
      (pieces.limit, len(prompt) + new),
      *zip(pieces.choices, request.choices(settings.eos_places), strict=True),
    ):
      column[row] = value
    pieces.ids[row, : len(prompt)] = prompt
  empty = state.empty(config, settings, rows, size, dtype)
  enter = enter or jax.jit(functools.partial(state.enter, config=config, settings=settings))
  return enter(params, empty, pieces)


def without_progress(text):
  """Standard error without what is said of programs that take long to compile."""
  return "".join(x for x in text.splitlines(True) if not x.startswith("compiling "))
