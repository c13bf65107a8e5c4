"""The training step in PyTorch, the peer of `benchmarks.step --peer`; runs alone as well.

    python -m benchmarks.torch_step --shape=1.5b --backward=round

What a careful PyTorch user would write on one GPU: transformers' model with SDPA (causal, one
example a row), layers compiled, bfloat16 autocast over float32 masters, the head with
cross-entropy in checkpointed chunks over scored tokens only, fused AdamW.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from torch.utils.checkpoint import checkpoint

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.torch_step")

from benchmarks import timing
from refine_jax.hf.families import FAMILIES
from refine_jax.model.config import ModelConfig
from refine_jax.training import flops as flops_lib

_CHUNK = 2048


def hf_values(config: ModelConfig) -> dict:
  """A config.json of this shape, as far as the benchmarks' shapes go: no windows, plain rope."""
  family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
  return {
    "architectures": [FAMILIES[family].architecture],
    "model_type": family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.feed_forward,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope.theta,
    "tie_word_embeddings": config.tied_head,
    "max_position_embeddings": config.max_length,
    "initializer_range": config.initializer_range,
    "bos_token_id": None,
    "eos_token_id": None,
  }


def make_model(config: ModelConfig, device: str):
  """Random float32 weights."""
  values = hf_values(config)
  hf = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
  with torch.device(device):
    return transformers.AutoModelForCausalLM.from_config(
      hf, attn_implementation="sdpa", dtype=torch.float32
    )


def head_loss(head, x_ND, targets_N, scale: float):
  """(scale * sum of cross-entropies, greedy predictions), logits made again for the gradient."""

  def piece(x, targets):
    logits = head(x).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1)

  total, predictions = 0.0, []
  for x, targets in zip(x_ND.split(_CHUNK), targets_N.split(_CHUNK), strict=True):
    loss, best = checkpoint(piece, x, targets, use_reentrant=False)
    total, predictions = total + scale * loss, [*predictions, best]
  return total, torch.cat(predictions)


class Step:
  """One optimizer step a call, on the same random batch; returns the sum of the rounds' losses."""

  def __init__(self, model, rows, length, *, rounds, backward, prompt, device):
    self.model, self.rounds, self.backward, self.device = model, rounds, backward, device
    self.optimizer = torch.optim.AdamW(
      model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    self.noise_token = model.config.vocab_size - 1
    self.clean = torch.randint(0, self.noise_token, (rows, length), device=device)
    position = torch.arange(length, device=device).expand(rows, length)
    self.response = position >= prompt
    # Tokens whose successor is scored, in the flat batch; the last of a row has none.
    self.scored = ((position + 1 >= prompt) & (position < length - 1)).flatten().nonzero()[:, 0]

  def __call__(self):
    rate = torch.empty((len(self.clean), 1), device=self.device).uniform_(0.1, 0.9)
    noised = self.response & (torch.rand(self.clean.shape, device=self.device) < rate)
    ids = torch.where(noised, self.noise_token, self.clean)
    total = 0.0
    for _ in range(self.rounds):
      loss, ids = self._round(ids)
      if self.backward == "round":
        loss.backward()
        loss = loss.detach()
      total = total + loss
    if self.backward == "joint":
      total.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return total.detach()

  def _round(self, ids):
    clean = self.clean.flatten()
    with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
      x = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
      loss, predictions = head_loss(
        self.model.lm_head,
        x.flatten(0, 1)[self.scored],
        clean[self.scored + 1],
        1 / len(self.scored),
      )
    following = clean.clone()
    following[self.scored + 1] = predictions
    return loss, following.view_as(ids)


def measure(
  shape: timing.Shape,
  *,
  rounds: int,
  rows: int,
  backward: str,
  checkpointing: bool,
  compiled: bool,
  repeats: int,
) -> dict:
  """One variant, as a row of benchmarks/step.py's table; without numbers where it is too big."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  result = {
    "variant": f"torch, backward {backward}" + (", checkpointing" if checkpointing else ""),
    "rows": rows,
    "length": shape.length,
  }
  if device == "cuda":
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  try:
    start = time.perf_counter()
    step, loss = _make_step(shape, rounds, rows, backward, checkpointing, compiled, device)
    compile_seconds = time.perf_counter() - start
    seconds = statistics.median(_timed(step, device) for _ in range(repeats))
  except torch.OutOfMemoryError:
    return result | {"tokens_per_second": None, "note": "out of memory"}
  tokens = rows * shape.length
  flops = flops_lib.train_flops_per_token(shape.model, shape.length, rounds)
  return result | {
    "attention": "sdpa",
    "step_ms": seconds * 1e3,
    "tokens_per_second": tokens / seconds,
    "model_tflops_per_second": tokens / seconds * flops / 1e12,
    "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    "compile_seconds": compile_seconds,
    "loss": loss,
  }


def _make_step(shape, rounds, rows, backward, checkpointing, compiled, device):
  """The step, warm, and its first loss."""
  torch.manual_seed(0)
  model = make_model(shape.model, device).train()
  if checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
  if compiled:
    for i, layer in enumerate(model.model.layers):
      model.model.layers[i] = torch.compile(layer)
  step = Step(
    model,
    rows,
    shape.length,
    rounds=rounds,
    backward=backward,
    prompt=min(128, shape.length // 16),
    device=device,
  )
  loss = float(step())
  for _ in range(2):
    step()
  return step, loss


def _timed(step, device) -> float:
  start = time.perf_counter()
  step()
  if device == "cuda":
    torch.cuda.synchronize()
  return time.perf_counter() - start


def main(argv=None) -> dict:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shape", choices=timing.SHAPES, default="1.5b")
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--rows", type=int, help="default: the shape's")
  parser.add_argument(
    "--backward",
    choices=("joint", "round"),
    default="round",
    help="one pass over all rounds, or one a round, which frees a round's activations",
  )
  parser.add_argument("--checkpointing", action="store_true")
  parser.add_argument("--no_compile", action="store_true")
  arguments = parser.parse_args(argv)
  shape = timing.SHAPES[arguments.shape]
  result = measure(
    shape,
    rounds=arguments.rounds,
    rows=arguments.rows or shape.rows,
    backward=arguments.backward,
    checkpointing=arguments.checkpointing,
    compiled=torch.cuda.is_available() and not arguments.no_compile,
    repeats=arguments.repeats,
  )
  print(json.dumps(result))
  return result


if __name__ == "__main__":
  main()
