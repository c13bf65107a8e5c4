"""Converts a run's checkpoint into a Hugging Face directory; `refine-jax export` is the same.

    python scripts/export_hf.py --workdir=runs/mine --output=models/mine [--step=N] [--dtype=...]

--help lists all options; refine_jax/export.py is what does it.
"""

from refine_jax.export import main

if __name__ == "__main__":
  main()
