"""Random adapters of tiny models, and directories that hold them."""

import jax
import numpy as np

from refine_jax.hf import config as hf_config
from refine_jax.hf import peft
from refine_jax.model import adapters


def random_adapter(config, *, kind="gated", rank=3, alpha=6.0, seed=1, **shape):
  """One that changes every projection visibly."""
  adapter = adapters.Adapter(kind=kind, rank=rank, alpha=alpha, **shape)
  rng = np.random.default_rng(seed)
  template = jax.eval_shape(lambda: adapters.init_params(config, adapter, jax.random.key(0)))
  factors = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), template)
  return peft.LoadedAdapter(adapter, factors)


def write_adapter(base, output, **shape):
  """A PEFT directory with a random adapter of the model in `base`; gives the adapter."""
  config = hf_config.read_model_config(base)
  adapter = random_adapter(config, **shape)
  output.mkdir()
  peft.write(output, adapter, config, hf_config.read_family(base), base=str(base))
  return adapter
