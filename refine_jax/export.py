"""Converts a run's checkpoint into a Hugging Face directory.

    refine-jax export --workdir=runs/mine --output=models/mine [--step=N] [--dtype=...]

A run with a gated adapter becomes the base, untouched, with the adapter beside it as a PEFT LoRA
directory; --base=reference leaves the base's weights where they are. --push_to_hub=owner/name
uploads what was written.
"""

import argparse

from refine_jax.cli import entry_point
from refine_jax.decoding import sources
from refine_jax.errors import UserError
from refine_jax.files import local_path, refuse_used
from refine_jax.hf import export as hf_export
from refine_jax.hf import export_adapter, push
from refine_jax.hf.card import model_card
from refine_jax.model import adapters


@entry_point
def main() -> None:
  """Runs `refine-jax export`."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--output", required=True, help="a new directory")
  parser.add_argument("--step", type=int, help="default: the newest checkpoint")
  parser.add_argument(
    "--dtype",
    help=f"{', '.join(hf_export.DTYPES)}; default: bfloat16; of an adapter's own files: float32",
  )
  parser.add_argument(
    "--base",
    choices=("copy", "reference", "merge"),
    help="of a run with an adapter: its base's files, or where they are; merge: the adapter added"
    " to it. Default: copy for a gated adapter, merge for lora",
  )
  parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload it, once it is written")
  parser.add_argument("--private", action="store_true", help="of a repository that is made so")
  parser.add_argument("--dataset", metavar="OWNER/NAME", help="on the hub, for the model card")
  arguments = parser.parse_args()
  workdir = local_path(arguments.workdir, "--workdir")
  output = local_path(arguments.output, "--output")
  if arguments.dtype is not None:
    hf_export.check_dtype(arguments.dtype)  # all this before the weights are read
  refuse_used(output)
  hub = arguments.push_to_hub
  if arguments.private and not hub:
    raise UserError("--private is for --push_to_hub, which was not given.")
  for option, name in (("--push_to_hub", hub), ("--dataset", arguments.dataset)):
    if name is not None:
      push.check_name(name, option)
  found = sources.from_workdir(workdir, arguments.step)
  assert found.step is not None and found.record is not None  # what a workdir always has
  how = _base(found, arguments.base)
  card = model_card(workdir, found.step, base=how, name=hub, dataset=arguments.dataset)
  if how in (None, "merge"):
    params = found.params
    if found.adapter is not None:
      params = adapters.merge(params, found.adapter.factors, found.adapter.shape)
    dtype = arguments.dtype or "bfloat16"
    output = hf_export.export(params, workdir / "model", output, dtype=dtype, card=card)
  else:
    assert found.adapter is not None  # or _base would be None
    output = export_adapter.export_adapter(
      found.adapter,
      workdir / "model",
      output,
      base=found.record["config"]["model"]["pretrained"],
      how=how,
      fingerprint=found.record["identity"]["base"],
      dtype=arguments.dtype or "float32",
      card=card,
    )
  print(f"step {found.step} -> {output}")
  if hub:
    message = f"Step {found.step} of {workdir.name}"
    print(f"{output} -> {push.push(output, hub, private=arguments.private, message=message)}")


def _base(found: sources.Source, asked: str | None) -> str | None:
  """How the base is written; None for a run that trained all weights."""
  if found.adapter is not None:
    return export_adapter.check_base(found.adapter.shape.kind, asked)
  if asked is not None:
    raise UserError(f"--base={asked} is for a run with an adapter, and this one has none.")
  return None


if __name__ == "__main__":
  main()
