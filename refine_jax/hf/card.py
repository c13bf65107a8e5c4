"""README.md of a release: what it is, what it was trained for, how to use it, its numbers."""

import json
import re
from pathlib import Path

from refine_jax import records
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.objective import noise as noise_kinds


def describe_training(config: dict) -> str:
  """Says in sentences what a run was trained for: losses, noise and the noise token.

  Args:
    config: the run's config.json.
  """
  objective, noise = config["objective"], config["noise"]
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


def model_card(workdir: str | Path, step: int) -> str:
  """The text of README.md for a step of a run.

  Raises:
    UserError: the workdir's config.json is not that of a run.
  """
  workdir = Path(workdir)
  config = hf_config.read_json(workdir)
  try:
    lines = [*_front_matter(config), *_body(config, workdir.name, step)]
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
    raise UserError(
      f"{workdir / 'config.json'} is not the config of a run ({type(error).__name__}: {error});"
      " give the workdir of a training run."
    ) from error
  lines += _metric_lines(workdir / records.NAME, step)
  lines += ["## Configuration", "", "```json", json.dumps(config, indent=2), "```", ""]
  return "\n".join(lines)


def _front_matter(config: dict) -> list[str]:
  base = config["model"]["pretrained"]
  lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
  lines += ["tags:", "- refine_jax", "- parallel-decoding"]
  # A local path says nothing to others, and the hub's form is owner/name.
  if base and not Path(base).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
    lines.append(f"base_model: {base}")
  return [*lines, "---", ""]


def _body(config: dict, name: str, step: int) -> list[str]:
  base = config["model"]["pretrained"]
  return [
    f"# {name}, step {step}",
    "",
    f"An ordinary causal language model{f', fine-tuned from {base},' if base else ''} trained"
    " with [refine_jax]. Its architecture is unchanged: everything that loads its base loads it.",
    "",
    f"Training: {describe_training(config)}",
    "",
    "```python",
    "import refine_jax",
    "",
    'model = refine_jax.load("THIS_DIRECTORY")',
    'out = refine_jax.generate(model, ["..."], mode="exact")',
    "print(out.texts[0], out.tokens_per_pass)",
    "```",
    "",
    "`exact` gives the text of greedy autoregressive decoding, in fewer passes. With transformers:",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
    "```",
    "",
  ]


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
