"""Converts a run's checkpoint into a Hugging Face directory.

python scripts/export_hf.py --workdir=runs/mine --output=models/mine [--step=N] [--dtype=...]
"""

import argparse

from refine_jax.checkpoint import checkpointer
from refine_jax.cli import entry_point
from refine_jax.files import local_path, refuse_used
from refine_jax.hf import export as hf_export


@entry_point
def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--output", required=True, help="a new directory")
  parser.add_argument("--step", type=int, help="default: the newest checkpoint")
  parser.add_argument("--dtype", default="bfloat16", help=", ".join(hf_export.DTYPES))
  arguments = parser.parse_args()
  workdir = local_path(arguments.workdir, "--workdir")
  output = local_path(arguments.output, "--output")
  hf_export.check_dtype(arguments.dtype)  # all this before the weights are read
  refuse_used(output)
  params, step = checkpointer.restore_params(workdir, arguments.step)
  output = hf_export.export(
    params,
    workdir / "model",
    output,
    dtype=arguments.dtype,
    card=hf_export.model_card(workdir, step),
  )
  print(f"step {step} -> {output}")


if __name__ == "__main__":
  main()
