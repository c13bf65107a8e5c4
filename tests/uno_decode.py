"""Two-pass decoding with a PEFT adapter in PyTorch alone, as SGLang's UNO does it.

A cycle is two calls. To draft: the text up to its last token with the base's weights, then noise
tokens at the positions after it with the adapter on; row i predicts token i + 1. To verify: the
drafts with the base's weights. Nothing of refine_jax is in here.
"""

import numpy as np
import torch
import transformers


def call(model, ids, cache=None):
  """The most likely token after each of `ids`, which follow what the cache holds."""
  with torch.no_grad():
    out = model(torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None)
  return out.logits[0].argmax(-1).tolist()


def drafts(model, text, noise) -> list[int]:
  """One more token than there is noise: the base's own next one comes first."""
  cache = transformers.DynamicCache()
  with model.disable_adapter():
    seed = call(model, text, cache)[-1]
  return [seed, *call(model, noise, cache)]


def decode(model, prompt, *, vocab_size, block, new, eos, noise_token=None, seed=0):
  """Greedy decoding with a peft.PeftModel.

  Args:
    block: drafts in a cycle.
    noise_token: None: drawn uniformly from the vocabulary.

  Returns:
    (at most `new` tokens, up to the first EOS; verified tokens in each cycle)
  """
  rng = np.random.default_rng(seed)
  text, counts = list(prompt), []
  while len(text) < len(prompt) + new and eos not in text[len(prompt) :]:
    noise = rng.integers(0, vocab_size, block - 1).tolist()
    if noise_token is not None:
      noise = [noise_token] * (block - 1)
    proposed = drafts(model, text, noise)
    with model.disable_adapter():
      predicted = call(model, text + proposed)[len(text) - 1 :]
    right = [a == b for a, b in zip(proposed, predicted, strict=False)]
    count = (*right, False).index(False) + 1
    text += predicted[:count]
    counts.append(count)
  answer = text[len(prompt) :][:new]
  return answer[: answer.index(eos) + 1] if eos in answer else answer, counts
