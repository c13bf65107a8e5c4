"""transformers' generate on a Hugging Face directory, for `benchmarks.sampler`."""

import json
import statistics
import time
from pathlib import Path

import torch
import transformers

from benchmarks.torch_step import hf_values
from refine_jax.model.transformer import ModelConfig


def write_config(config: ModelConfig, directory: Path) -> Path:
  """A directory with the config.json of a shape."""
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps(hf_values(config)), encoding="utf-8")
  return directory


def load(directory, dtype: str):
  """The model, on a GPU where PyTorch has one."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
  )
  model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
  return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def greedy(model, ids, new: int):
  """transformers' generate with its KV cache: [B, new]."""
  out = model.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True
  )
  return out[:, ids.shape[1] :]


@torch.no_grad()
def refine(model, ids, new: int, *, block: int, passes: int, noise_token: int):
  """Block refinement without a cache, as the method was first described: [B, new].

  Each block starts as noise, all tokens run through the model in every pass, and what the last
  pass predicts is committed.
  """
  prompt = ids.shape[1]
  while ids.shape[1] < prompt + new:
    drafts = torch.full((len(ids), block), noise_token, device=ids.device)
    for _ in range(passes):
      tokens = torch.cat([ids, drafts[:, :-1]], dim=1)
      logits = model(input_ids=tokens, use_cache=False, logits_to_keep=block).logits
      drafts = logits.argmax(-1)
    ids = torch.cat([ids, drafts], dim=1)
  return ids[:, prompt : prompt + new]


def measure(name: str, function, prompts: list[list[int]], repeats: int, device) -> tuple:
  """A row for the sampler's table, and the new tokens of each prompt.

  Args:
    function: ids [B, P] -> new tokens [B, n].
  """
  ids = torch.tensor(prompts, device=device)

  def run():
    start = time.perf_counter()
    tokens = function(ids).tolist()  # waits for the device
    return time.perf_counter() - start, tokens

  tokens = run()[1]
  wall = statistics.median(run()[0] for _ in range(repeats))
  count = sum(map(len, tokens))
  row = {
    "mode": name,
    "batch": len(prompts),
    "tokens": count,
    "wall_ms": wall * 1e3,
    "wall_tokens_per_second": count / wall,
  }
  return row, tokens
