"""Prompts as token ids, and which of many prompts a model cannot answer."""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from refine_jax.decoding.loading import Model
from refine_jax.errors import UserError
from refine_jax.quoting import cut
from refine_jax.text.chat import encode_prompt
from refine_jax.text.vocabulary import check_ids


def prompt_ids(model: Model, prompt: Any, chat_template: str, name: str) -> list[int]:
  """Returns the ids of one prompt, which fit the model.

  Args:
    prompt: a string, chat messages or token ids, as `generation.generate` takes them.
    name: what errors call it.

  Raises:
    UserError: it is none of these, has ids outside the vocabulary, or leaves no room for an answer.
  """
  if isinstance(prompt, (np.ndarray, jax.Array)):
    prompt = prompt.tolist()
  # Bytes are sequences of numbers too, and no token ids.
  listed = isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview)
  if not isinstance(prompt, str) and not (listed and prompt):
    raise UserError(f"{name} is {cut(repr(prompt))}; give a string, chat messages or token ids.")
  if isinstance(prompt, str) or isinstance(prompt[0], dict):
    ids = encode_prompt(model.require_tokenizer(), prompt, chat_template, name)
  elif all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in prompt):
    ids = [int(i) for i in prompt]
  else:
    raise UserError(f"{name} mixes what is no token id into its ids.")
  check_ids(ids, model.config.vocab_size, name, model.tokenizer)
  context = model.config.max_length
  if len(ids) >= context:
    raise UserError(
      f"{name} has {len(ids)} tokens, which leaves no room in the model's {context} positions."
    )
  return ids


def refusals(
  model: Model, prompts: Sequence, chat_template: str = "", name: str = "The prompt"
) -> dict[int, str]:
  """Finds the prompts that cannot be answered: index -> why not, in one line.

  The one rule for batches of prompts out of files: such a prompt is named and counted, and takes
  no part; the others are answered. An evaluation counts it as not solved, a relabelling keeps its
  response, scripts/sample.py writes an error in its place.

  Args:
    name: what the reasons call a prompt; "{}" in it becomes its number, from 1.
  """
  result = {}
  for index, prompt in enumerate(prompts):
    try:
      prompt_ids(model, prompt, chat_template, name.format(index + 1))
    except UserError as error:
      result[index] = str(error)
  return result
