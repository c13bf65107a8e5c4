"""What a run of an adapter chooses where its config leaves it open."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
import train_fixtures as tiny

from benchmarks import timing
from refine_jax import sharding, target
from refine_jax.attention import ranged
from refine_jax.config import Config, MeshConfig, NoiseConfig
from refine_jax.config.schema import AdapterConfig, DataConfig, ModelSource
from refine_jax.model import adapters
from refine_jax.model import remat as remat_lib
from refine_jax.training import choices, memory

CONFIG = Config(
  adapter=AdapterConfig(kind="gated", rank=2),
  noise=NoiseConfig(kind="block"),
  data=DataConfig(max_length=64),
  model=ModelSource(pretrained="model", compute_dtype="float32", attention="xla"),
)
MESH = MeshConfig(data=1, fsdp=2, tensor=1)


def choose(config=CONFIG, shape=None):
  mesh = sharding.make_mesh(MESH, jax.devices()[:2])
  plan = SimpleNamespace(max_segments=2, most_tiles=lambda drafts: 5)
  return choices.choose_forward(config, shape or tiny.tiny_config(), mesh, plan)


def test_attention_by_xla_is_that_of_drafts_too(monkeypatch):
  monkeypatch.setattr(ranged, "choose", lambda *_: "kernel")
  assert choose().draft_attention == "xla"
  auto = dataclasses.replace(CONFIG.model, attention="auto")
  assert choose(dataclasses.replace(CONFIG, model=auto)).draft_attention == "kernel"


@pytest.mark.parametrize("kind", ["gated", "lora"])
def test_a_frozen_head_recomputes_nothing(kind):
  adapter = dataclasses.replace(CONFIG.adapter, kind=kind)
  assert choose(dataclasses.replace(CONFIG, adapter=adapter)).head_gradient == "forward"


def test_the_base_and_the_clean_keys_and_values_take_their_room(monkeypatch):
  rooms = []

  def remat(wanted, shape, **options):
    rooms.append(options["memory"])
    return "full"

  monkeypatch.setattr(memory, "choose_remat", remat)
  monkeypatch.setattr(target, "memory", lambda: 10**9)
  choose()
  choose(dataclasses.replace(CONFIG, adapter=dataclasses.replace(CONFIG.adapter, kind="lora")))
  shape = tiny.tiny_config()
  rows = CONFIG.optim.micro_batch // 2
  assert rooms[1] - rooms[0] == memory.kept_keys_values(shape, rows * 64, 4) > 0


@pytest.mark.parametrize(
  ("tokens", "remat", "gibibytes"),
  [
    # XLA's analysis of the step compiled for an H100, without the base: docs/adapters.md.
    (3675, "none", 45.1),
    (3675, "save_attention_mlp", 19.0),
    (7350, "save_attention_mlp", 29.9),
    (7770, "save_attention_mlp", 31.2),
  ],
)
def test_what_fits_by_the_estimate_fits_by_the_compiler(tokens, remat, gibibytes):
  """Llama-3-8B's shape, of which a GPU of 80 GB holds the base and what the compiler asks for."""
  shape = timing.SHAPES["8b"].model
  trained = sum(x.size for x in jax.tree.leaves(choices.param_shapes(shape, adapters.Adapter())))

  def chosen(memory_of_device):
    room = memory_of_device - memory.kept_keys_values(shape, 4096, 2)
    options = {"dtype": "bfloat16", "parameters": trained, "head_chunk": 2048, "adapted": True}
    return memory.choose_remat("auto", shape, tokens=tokens, memory=room, **options)

  ranks = [*remat_lib.POLICIES]
  # With nine tenths of it a policy that saves less is chosen; with a quarter more it is taken.
  assert ranks.index(chosen(int(0.9 * gibibytes * 2**30))) > ranks.index(remat)
  assert ranks.index(chosen(int(1.25 * gibibytes * 2**30))) <= ranks.index(remat)
