"""python -m refine_jax.config > docs/config.md"""

import sys

from refine_jax.config.describe import markdown

sys.stdout.write(markdown())
