"""The base of a run that trains an adapter: loaded once, in the computing dtype, never changed."""

import warnings

import jax

from refine_jax import sharding
from refine_jax.checkpoint import checksums
from refine_jax.hf import weights as hf_weights
from refine_jax.model import transformer
from refine_jax.training.forward import ForwardConfig
from refine_jax.training.source import ModelSource
from refine_jax.tree import leaf_name


def load_frozen(source: ModelSource, forward: ForwardConfig) -> tuple[dict, str]:
  """The working copy of the base, on its devices, and the fingerprint of its weights as stored."""
  shapes = transformer.param_shapes(source.model)
  assert forward.mesh is not None  # None is for single functions; a run makes one
  places = sharding.shardings(shapes, forward.mesh)
  by_name = {leaf_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(places)}

  def place(name, array):  # a leaf at a time: never two copies of the model on the host
    return jax.make_array_from_callback(array.shape, by_name[name], lambda index: array[index])

  params = hf_weights.load_params(source.directory, source.model, place=place)
  fingerprint = checksums.fingerprint(params)
  with warnings.catch_warnings():
    # Joined and cast arrays need memory of their own; all others stay where they are.
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    return jax.jit(forward.freeze, donate_argnums=0)(params), fingerprint
