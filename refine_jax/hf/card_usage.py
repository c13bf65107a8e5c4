"""The part of a model card that says how a release is used, here and in transformers."""


def use_here(place: str) -> list[str]:
  """Lines of README.md: decoding with this library."""
  return [
    "With refine_jax, in JAX:",
    "",
    "```python",
    "import refine_jax",
    "",
    f'model = refine_jax.load("{place}")',
    'out = refine_jax.generate(model, ["..."], mode="exact")',
    "print(out.texts[0], out.tokens_per_pass)",
    "```",
    "",
  ]


def use_in_transformers(place: str, base: str | None = None) -> list[str]:
  """Lines of README.md: decoding in PyTorch with the release's own code.

  Args:
    base: where the weights are, if not in the release.
  """
  export = f', export="{place}"' if base else ""
  return [
    "With transformers (4.57 or 5), in PyTorch, by `custom_generate/generate.py` of this release:",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    f'model = AutoModelForCausalLM.from_pretrained("{base or place}", dtype="auto").to("cuda")',
    'chat = [{"role": "user", "content": "..."}]',
    "inputs = tokenizer.apply_chat_template(",
    '  chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ").to(model.device)",
    "out = model.generate(",
    f'  **inputs, max_new_tokens=512, custom_generate="{place}"{export}, trust_remote_code=True',
    ")",
    'print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    "```",
    "",
    "Greedy text is that of `generate` without `custom_generate`, in fewer passes; with `do_sample`"
    " samples have the same distribution. In bfloat16 rounding may part two texts where two logits"
    " are nearly equal.",
    "",
  ]


def drafts(config: dict) -> str:
  """Says in sentences where the drafts of a release come from by default.

  Args:
    config: the run's config.json.
  """
  noise = config["noise"]
  adapter = config.get("adapter", {"kind": "none"})["kind"]
  if adapter == "gated" or noise.get("kind", "uniform") == "block":
    return (
      f"A pass adds up to {noise['block_size']} tokens: drafts come from a run of noise after each"
      " place where the verified text may end."
    )
  plain = noise["noise_max"] == 0
  return (
    "Drafts are what the last pass predicted past the verified text"
    f"{'; nothing was trained to make them, so they are seldom right' if plain else ''}."
  )
