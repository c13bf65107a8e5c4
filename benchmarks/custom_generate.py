"""transformers' generate beside the custom_generate of an export, on one device.

    python -m benchmarks.custom_generate --shape=1.5b --adapter_rank=128
    python -m benchmarks.custom_generate --model=models/mine --data=test.parquet --problems=16

With random weights the time of a pass counts, beside that of a token of transformers: how many
tokens a pass gives, a trained model says on prompts like those it was trained on. JAX is not used.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
import transformers

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit(
    "error: run it from the repository's root as python -m benchmarks.custom_generate"
  )

from benchmarks import timing
from benchmarks.torch_step import hf_values
from refine_jax.evaluation import reading
from refine_jax.hf.model_files import add_custom_generate
from refine_jax.text.chat import encode_prompt
from refine_jax.text.tokenizer import load_tokenizer

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_model(shape: timing.Shape, device, dtype):
  """A model without a directory of its own."""
  values = hf_values(shape.model)
  config = transformers.AutoConfig.for_model(**values)
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
  model.generation_config.eos_token_id = None
  return model.eval()


def write_export(model, directory: Path, arguments):
  """What `custom_generate` reads of an export: its code, "refinement", and a random adapter."""
  refinement = {"noise_token": 0, "block_size": arguments.block_size or 8}
  add_custom_generate(directory)
  if arguments.adapter_rank:
    rank, tensors = arguments.adapter_rank, {}
    for name, module in model.named_modules():
      if name.endswith(_TARGETS):
        prefix, (outputs, inputs) = f"base_model.model.{name}.lora_", module.weight.shape
        tensors[f"{prefix}A.weight"] = torch.randn(rank, inputs) * 0.02
        tensors[f"{prefix}B.weight"] = torch.randn(outputs, rank) * 0.02
    folder = directory / "adapter"
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    values = {"r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    refinement["adapter"] = "adapter"
  (directory / "generation_config.json").write_text(json.dumps({"refinement": refinement}))


def prompts_of(arguments, vocabulary: int) -> list[list[int]]:
  """Token ids: of the data's prompts, or random ones."""
  if not arguments.data:
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.problems, arguments.prompt)
    return torch.randint(3, vocabulary, shape, generator=generator).tolist()
  tokenizer = load_tokenizer(arguments.model)
  rows = reading.read(arguments.data, arguments.problems, "--data", ["prompt"]).rows
  return [encode_prompt(tokenizer, row["prompt"]) for row in rows]


def measure(model, batches: list, repeats: int, **options) -> dict:
  """Median seconds of answering all batches, the answers, and the passes of each row if known."""

  def run():
    answers, passes = [], []
    for ids, mask in batches:
      out = model.generate(
        ids, attention_mask=mask, do_sample=False, return_dict_in_generate=True, **options
      )
      answers += out.sequences[:, ids.shape[1] :].tolist()  # waits for the device
      passes += out["passes"].tolist() if "passes" in out else []
    return answers, passes

  answers, passes = run()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return {"seconds": statistics.median(seconds), "answers": answers, "passes": passes}


def batched(prompts: list[list[int]], rows: int, pad: int, device) -> list:
  """(ids, mask) of so many prompts each, padded on the left."""
  batches = []
  for first in range(0, len(prompts), rows):
    part = prompts[first : first + rows]
    width = max(map(len, part))
    ids = [[pad] * (width - len(p)) + p for p in part]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in part]
    batches.append((torch.tensor(ids, device=device), torch.tensor(mask, device=device)))
  return batches


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--model", help="an export; default: random weights of --shape")
  parser.add_argument("--data", default="", help="with --model: parquet with a column prompt")
  parser.add_argument("--problems", type=int, default=1, help="prompts in all")
  parser.add_argument("--rows", type=int, default=1, help="prompts at a time")
  parser.add_argument("--prompt", type=int, default=128, help="tokens of a random prompt")
  parser.add_argument("--new", type=int, default=256, help="most new tokens")
  parser.add_argument("--block_size", type=int)
  parser.add_argument("--adapter_rank", type=int, default=0, help="with --shape: a random adapter")
  parser.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
  parser.add_argument("--no_cuda_graph", action="store_true")
  arguments = parser.parse_args(argv)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
  with tempfile.TemporaryDirectory(prefix="refine-jax-export-") as scratch:
    if arguments.model:
      model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
      )
      model, where = model.to(device).eval(), arguments.model
      options = {}
    else:
      model = random_model(timing.SHAPES[arguments.shape], device, getattr(torch, dtype))
      where = scratch
      write_export(model, Path(scratch), arguments)
      options = {"export": scratch}
    pad = model.generation_config.pad_token_id or 0
    prompts = prompts_of(arguments, model.config.vocab_size)
    batches = batched(prompts, arguments.rows, pad, device)
    common = {"max_new_tokens": arguments.new, "pad_token_id": pad}
    theirs = measure(model, batches, arguments.repeats, **common)
    if arguments.block_size:
      options["block_size"] = arguments.block_size
    options["cuda_graph"] = not arguments.no_cuda_graph
    ours = measure(
      model,
      batches,
      arguments.repeats,
      custom_generate=where,
      trust_remote_code=True,
      **common,
      **options,
    )
  result = summary(theirs, ours, model.generation_config.eos_token_id)
  result |= {
    "model": arguments.model or arguments.shape,
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "dtype": dtype,
    "transformers": transformers.__version__,
    "torch": torch.__version__,
    "rows": arguments.rows,
    "block_size": arguments.block_size,
    "adapter_rank": arguments.adapter_rank,
  }
  print(json.dumps(result))
  return result


def summary(theirs: dict, ours: dict, eos: int | list[int] | None) -> dict:
  """Times a token and a pass, with the tokens that were asked for: up to a row's first EOS."""
  ends = set([eos] if isinstance(eos, int) else eos or ())

  def cut(answer):
    return next((answer[: i + 1] for i, token in enumerate(answer) if token in ends), answer)

  texts = {id(x): [cut(answer) for answer in x["answers"]] for x in (theirs, ours)}
  counts = {key: sum(map(len, answers)) for key, answers in texts.items()}
  same = [a == b for a, b in zip(texts[id(theirs)], texts[id(ours)], strict=True)]
  their_ms, our_ms = (x["seconds"] * 1e3 / counts[id(x)] for x in (theirs, ours))
  return {
    "transformers_ms_per_token": their_ms,
    "custom_ms_per_token": our_ms,
    "speedup": their_ms / our_ms,
    "tokens_per_pass": counts[id(ours)] / sum(ours["passes"]),
    # Of one row at a time; with several, passes of rows that end early are others' passes too.
    "custom_ms_per_row_pass": ours["seconds"] * 1e3 / sum(ours["passes"]),
    "tokens": counts[id(ours)],
    "same_answers": sum(same) / len(same),
  }


if __name__ == "__main__":
  main()
