"""README.md of a release: what it is, what it was trained for, how to use it, its numbers."""

import json
import re
from pathlib import Path

from refine_jax import records
from refine_jax.errors import UserError
from refine_jax.hf import card_usage
from refine_jax.hf import config as hf_config
from refine_jax.hf.card_adapter import adapter_body
from refine_jax.objective import noise as noise_kinds


def describe_training(config: dict) -> str:
  """Says in sentences what a run was trained for: losses, noise and the noise token.

  Args:
    config: the run's config.json.
  """
  objective, noise = config["objective"], config["noise"]
  adapter = config.get("adapter", {"kind": "none"})
  if adapter["kind"] == "gated":
    return _describe_gated(adapter, objective, noise)
  if adapter["kind"] == "lora":
    lora = f"A LoRA adapter ({_describe_adapter(adapter)}) on a frozen base. "
    return lora + describe_training(config | {"adapter": {"kind": "none"}})
  rounds, clean = objective["num_iterations"], objective.get("clean_weight", 0)
  kind = noise.get("kind", "uniform")
  if kind == "uniform" and rounds == 1 and noise["noise_max"] == 0:
    return "The next-token loss on responses, without noise: plain fine-tuning."
  token = noise.get("token", -1)
  token = "the tokenizer's EOS" if token == -1 else f"token {token}"
  weights = ", ".join(f"{w:g}" for w in objective["loss_weights"])
  parts = [
    f"{rounds} refinement round{'s' if rounds > 1 else ''}"
    f" with loss weight{'s' if rounds > 1 else ''} {weights};"
    f" {f'the next-token loss on the clean text has weight {clean:g}' if clean else 'no'}"
    f"{'' if clean else ' next-token loss on the clean text'}."
  ]
  parts.append(noise_kinds.describe(noise, token))
  return " ".join(parts)


def _describe_adapter(adapter: dict) -> str:
  return (
    f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {', '.join(adapter['projections'])}"
  )


_TARGETS = {
  "data": "the text's next token",
  "greedy": "the base's most likely next token",
  "kl": "the base's distribution, by its divergence",
  "tv": "the base's distribution, by total variation",
}


def _describe_gated(adapter: dict, objective: dict, noise: dict) -> str:
  size = noise["block_size"]
  anchors = noise.get("anchors", 0)
  shown = f"{anchors} blocks a row, drawn anew in each step" if anchors else "all of a response"
  return (
    f"A gated adapter ({_describe_adapter(adapter)}) on a frozen base: it acts on noise tokens"
    f" alone. Blocks of {size} tokens ({shown}) hold {size - 1} drafts each, which learn"
    f" {_TARGETS[objective['draft_target']]}. {describe_noise(noise)}"
  )


def describe_noise(noise: dict) -> str:
  """Says what a noise token of a gated adapter's training is: a fixed id, or any."""
  if noise.get("random"):
    return "A noise token is drawn uniformly from the whole vocabulary."
  token = noise.get("token", -1)
  return f"Every noise token is {'the EOS' if token == -1 else f'token {token}'}."


def model_card(
  workdir: str | Path,
  step: int,
  *,
  base: str | None = None,
  name: str | None = None,
  dataset: str | None = None,
) -> str:
  """The text of README.md for a step of a run.

  Args:
    base: of a run with an adapter: how its base is written, "copy", "reference" or "merge".
    name: on the hub, owner/name; None: it is not there.
    dataset: name on the hub of what the run was trained on, or None.

  Raises:
    UserError: the workdir's config.json is not that of a run.
  """
  workdir = Path(workdir)
  config = hf_config.read_json(workdir)
  title, place = f"# {(name or workdir.name).split('/')[-1]}, step {step}", name or "THIS_DIRECTORY"
  try:
    training = describe_training(config)
    if base in ("copy", "reference"):
      body = adapter_body(config, place, base, training)
    else:
      body = _body(config, place, training)
    lines = [*_front_matter(config, base, dataset), title, "", *body]
    lines += _data_lines(config, dataset)
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
    raise UserError(
      f"{workdir / 'config.json'} is not the config of a run ({type(error).__name__}: {error});"
      " give the workdir of a training run."
    ) from error
  lines += _metric_lines(workdir / records.NAME, step)
  lines += ["## Configuration", "", "```json", json.dumps(config, indent=2), "```", ""]
  return "\n".join(lines)


def _front_matter(config: dict, how: str | None, dataset: str | None) -> list[str]:
  base = config["model"]["pretrained"]
  adapter = config.get("adapter", {"kind": "none"})["kind"]
  peft = adapter == "lora" and how == "reference"
  lines = ["---", f"library_name: {'peft' if peft else 'transformers'}"]
  lines += ["pipeline_tag: text-generation", "tags:", "- refine_jax", "- parallel-decoding"]
  lines += [] if peft else ["- custom_generate"]
  # A local path says nothing to others, and the hub's form is owner/name.
  if base and not Path(base).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
    relation = "adapter" if how in ("copy", "reference") else "finetune"
    lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
  lines += ["datasets:", f"- {dataset}"] if dataset else []
  return [*lines, "---", ""]


def _body(config: dict, place: str, training: str) -> list[str]:
  base = config["model"]["pretrained"]
  return [
    f"An ordinary causal language model{f', fine-tuned from {base},' if base else ''} trained"
    " with refine_jax. Its architecture is unchanged: everything that loads its base loads it, and"
    " then decodes one token a pass.",
    "",
    f"Training: {training}",
    "",
    f"`exact` gives the text of greedy decoding, token for token. {card_usage.drafts(config)}",
    "",
    *card_usage.use_in_transformers(place),
    *card_usage.use_here(place),
  ]


def _data_lines(config: dict, dataset: str | None) -> list[str]:
  """What it was trained on: names of files, without folders of the machine that it ran on."""
  names = [
    re.split(r"[/\\]", x)[-1] for x in config.get("data", {}).get("train_files", "").split(",")
  ]
  said = ", ".join(f"`{x}`" for x in names if x)
  if dataset:
    said = f"{dataset}{f' ({said})' if said else ''}"
  return [f"Data: {said}.", ""] if said else []


def _metric_lines(path: Path, step: int) -> list[str]:
  """The newest training and validation numbers up to the step, as a table."""
  newest: dict = {}
  for record in records.read(path):
    if record["step"] <= step:
      newest |= {k: v for k, v in record.items() if isinstance(v, int | float)}
  names = [n for n in sorted(newest) if n.removeprefix("eval/").startswith(("loss_", "accuracy_"))]
  if not names:
    return []
  return [
    "## Metrics",
    "",
    "| metric | value |",
    "| --- | --- |",
    *(f"| {name} | {newest[name]:.4f} |" for name in names),
    "",
  ]
