"""The part of a model card that says what an adapter's release is, and how it is used."""


def adapter_body(config: dict, name: str, step: int, base: str, training: str) -> list[str]:
  """Lines of README.md.

  Args:
    config: the run's config.json.
    base: "copy" or "reference".
    training: what the run was trained for, in sentences.

  Raises:
    KeyError: it is not the config of a run.
  """
  gated = config["adapter"]["kind"] == "gated"
  source = config["model"]["pretrained"]
  where = "THIS_DIRECTORY" if base == "copy" else source
  lines = [f"# {name}, step {step}", ""]
  if gated:
    lines += [
      f"{source} with a gated adapter, trained with [refine_jax]. The base's weights are as they"
      " were, and the adapter acts on noise tokens alone, which are never part of a text: the text"
      " of `exact` is the base's, whatever the adapter is, in fewer passes.",
      "",
    ]
  else:
    lines += [f"A LoRA adapter of {source}, as a PEFT directory, trained with [refine_jax].", ""]
  if base == "reference":
    lines += [f"The base's weights are not in here; they are loaded from {source}.", ""]
  lines += [f"Training: {training}", "", "```python", "import refine_jax", ""]
  lines += ['model = refine_jax.load("THIS_DIRECTORY")']
  lines += ['out = refine_jax.generate(model, ["..."], mode="exact")']
  lines += ["print(out.texts[0], out.tokens_per_pass)", "```", "", "With PEFT:", ""]
  folder = "THIS_DIRECTORY/adapter" if gated else "THIS_DIRECTORY"
  lines += ["```python", "from peft import PeftModel"]
  lines += ["from transformers import AutoModelForCausalLM", ""]
  lines += [f'base = AutoModelForCausalLM.from_pretrained("{where}")']
  lines += [f'model = PeftModel.from_pretrained(base, "{folder}")', "```", ""]
  return lines + (_serving(config, where, folder) if gated else [])


def _serving(config: dict, where: str, folder: str) -> list[str]:
  noise = config["noise"]
  law = (
    "as this adapter was trained."
    if noise.get("random")
    else "and this adapter was trained with one fixed token, so fewer drafts will be right there."
  )
  return [
    "PEFT switches the adapter for all tokens of a call; it belongs on drafts only. A cycle of two"
    " calls: the last verified token without the adapter and noise tokens after it with it, whose"
    " row i predicts token i + 1; then the drafts without the adapter, to verify them. SGLang's UNO"
    " does that (not tested here):",
    "",
    "```sh",
    f"python -m sglang.launch_server --model-path {where} --speculative-algorithm UNO \\",
    f"  --uno-lora-path {folder} --speculative-num-draft-tokens {noise['block_size']}",
    "```",
    "",
    f"It draws noise tokens uniformly from the vocabulary, {law}",
    "",
  ]
