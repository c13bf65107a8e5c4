"""Random adapters of tiny models, directories that hold them, and workdirs."""

import json

import grain
import hf_fixtures
import jax
import numpy as np

from configs import base as base_config
from refine_jax.checkpoint import checksums
from refine_jax.checkpoint.checkpointer import Checkpointer
from refine_jax.decoding import loading
from refine_jax.hf import config as hf_config
from refine_jax.hf import model_files, peft
from refine_jax.model import adapters
from refine_jax.training.startup import identity


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


class AdapterRun:
  """A workdir as a run leaves it, its base in two shards, and what was saved."""

  def __init__(self, place, kind, family="qwen3"):
    self.base, self.torch_model = hf_fixtures.tiny_hf_model(family, place)
    (self.base / "model.safetensors").unlink()
    self.torch_model.save_pretrained(self.base, max_shard_size="40KB")
    self.workdir = place / "run"
    model = loading.load(self.base)
    self.params = model.params
    self.adapter = random_adapter(model.config, kind=kind)
    config = base_config.get_config("blocks")
    config.update_from_flattened_dict(
      {"model.pretrained": str(self.base), "adapter.kind": kind, "adapter.rank": 3}
    )
    self.config = json.loads(config.to_json())
    tokenizer = hf_fixtures.words_tokenizer()
    model_files.save_model_files(
      self.base,
      tokenizer,
      self.workdir / "model",
      refinement={"noise_token": 7, "block_size": 4},
    )
    (self.workdir / "config.json").write_text(json.dumps(self.config))
    self.identity = identity(model.config, self.adapter.shape, checksums.fingerprint(self.params))
    writer = Checkpointer(self.workdir, max_to_keep=2)
    iterator = iter(grain.MapDataset.source([1, 2, 3]).to_iter_dataset())
    state = {"params": self.adapter.factors, "step": np.int32(7)}
    writer.save(7, state, iterator, self.config, self.identity)
    writer.close()
