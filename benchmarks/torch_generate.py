"""transformers' generate on a Hugging Face directory, for `benchmarks.sampler`."""

import json
import statistics
import time
from pathlib import Path

import torch
import transformers

from benchmarks.torch_step import hf_values
from refine_jax.model import ModelConfig


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
def measure(model, prompts: list[list[int]], new: int, repeats: int) -> tuple:
  """A row for the sampler's table, and the new tokens of each prompt."""
  ids = torch.tensor(prompts, device=model.device)

  def run():
    start = time.perf_counter()
    out = model.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
      use_cache=True,
    )  # fmt: skip
    tokens = out[:, ids.shape[1] :].tolist()  # waits for the device
    return time.perf_counter() - start, tokens

  tokens = run()[1]
  wall = statistics.median(run()[0] for _ in range(repeats))
  count = sum(map(len, tokens))
  row = {
    "mode": "torch generate",
    "batch": len(prompts),
    "block": 1,
    "tokens": count,
    "passes": new,
    "tokens_per_pass": 1.0,
    "wall_ms": wall * 1e3,
    "wall_tokens_per_second": count / wall,
  }
  return row, tokens
