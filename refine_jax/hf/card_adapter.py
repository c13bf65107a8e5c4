"""The part of a model card that says what an adapter's release is, and how it is used."""

from refine_jax.hf import card_usage


def adapter_body(config: dict, place: str, base: str, training: str) -> list[str]:
  """Lines of README.md.

  Args:
    config: the run's config.json.
    place: the release: a name on the hub, or what stands for a directory.
    base: "copy" or "reference".
    training: what the run was trained for, in sentences.

  Raises:
    KeyError: it is not the config of a run.
  """
  gated = config["adapter"]["kind"] == "gated"
  source = config["model"]["pretrained"]
  where = place if base == "copy" else source
  lines = []
  if gated:
    lines += [
      f"{source} with a gated adapter, trained with refine_jax. The base's weights are as they"
      " were, and the adapter acts on noise tokens alone, which are never part of a text: the text"
      " of `exact` is the base's, whatever the adapter is, in fewer passes."
      f" {card_usage.drafts(config)}",
      "",
    ]
  else:
    lines += [f"A LoRA adapter of {source}, as a PEFT directory, trained with refine_jax.", ""]
  if base == "reference":
    lines += [f"The base's weights are not in here; they are loaded from {source}.", ""]
  lines += [f"Training: {training}", ""]
  if gated:
    lines += card_usage.use_in_transformers(place, None if base == "copy" else source)
  lines += [*card_usage.use_here(place), "With PEFT:", ""]
  folder = f"{place}/adapter" if gated else place
  loaded = f'"{place}", subfolder="adapter"' if gated else f'"{place}"'
  lines += ["```python", "from peft import PeftModel"]
  lines += ["from transformers import AutoModelForCausalLM", ""]
  lines += [f'base = AutoModelForCausalLM.from_pretrained("{where}")']
  lines += [f"model = PeftModel.from_pretrained(base, {loaded})", "```", ""]
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
