"""The declared keys, and what is made of them: defaults, --help, docs, bounds of values."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from config_fixtures import changed, parse, refusal

from configs import base
from refine_jax.config import Config, NoiseConfig, OptimConfig
from refine_jax.config import key as key_lib
from refine_jax.config.describe import help_text, markdown
from refine_jax.errors import UserError
from refine_jax.model import remat

ROOT = Path(__file__).parents[1]
KEYS = {key.name: key for key in key_lib.all_keys(Config)}


def value_of(config: Config, name: str):
  for part in name.split("."):
    config = getattr(config, part)
  return config


def test_base_holds_every_declared_default_and_is_locked():
  c = base.get_config()
  assert c.is_locked
  assert [n for n, key in KEYS.items() if value_of(c, n) != key.default] == []
  assert sum(len(v) if hasattr(v, "keys") else 1 for v in c.values()) == len(KEYS)


@pytest.mark.parametrize("name", KEYS)
def test_every_default_is_a_value_that_its_key_takes(name):
  assert KEYS[name].convert(KEYS[name].default) == KEYS[name].default


def test_every_key_is_read_by_a_module_outside_of_config():
  text = "".join(
    p.read_text(encoding="utf-8")
    for p in (ROOT / "refine_jax").rglob("*.py")
    if p.parent.name != "config" or p.name in ("checks.py",)
  )
  properties = {
    "clip_grad": "clip_norm",
    "profile_steps": "profile",
    "token": "token_id",
    "total_steps": "step_limit",
  }
  for name in KEYS:
    last = name.rpartition(".")[2]
    assert re.search(rf"\.{properties.get(last, last)}\b", text), name


def test_help_names_every_key_with_its_default_and_meaning():
  words = " ".join(help_text().split())
  for name, key in KEYS.items():
    assert f" {name} " in words and " ".join(key.meaning.split()) in words
    assert key_lib.shown(key.default) in words and key.values() in words
  assert all(f"--{name}" in words for name in ("config", "workdir", "flagfile"))


def test_help_comes_in_two_seconds_and_loads_no_jax():
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-X", "importtime", "-m", "refine_jax.main", "--help"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert time.monotonic() - start < 2 and done.returncode == 0
  assert done.stdout == help_text()
  assert not re.search(r"\| +(jax|flax|orbax|grain|transformers)$", done.stderr, re.MULTILINE)


def test_the_page_of_keys_is_current():
  assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == markdown(), (
    "python -m refine_jax.config > docs/config.md"
  )


def test_the_policies_of_remat_are_the_models_own():
  assert KEYS["model.remat"].choices == ("auto", *remat.POLICIES)
  assert KEYS["model.remat"].aliases == remat.ALIASES


def test_special_numbers_resolve_to_none_in_one_place():
  assert NoiseConfig().token_id is None and NoiseConfig(token=0).token_id == 0
  assert OptimConfig().step_limit is None and OptimConfig(total_steps=7).step_limit == 7
  assert OptimConfig(clip_grad=0.0).clip_norm is None and OptimConfig().clip_norm == 1.0


REFUSED = {
  "data.max_length": [1, 2**24 + 1, 2**31, 2**63],
  "data.max_segments": [0, 2**31],
  "noise.block_size": [0, 2**31],
  "noise.token": [-2, 2**31],
  "noise.offset_decay": [0.0, 1.5],
  "optim.batch_size": [0, 2**31],
  "optim.total_steps": [0, -2, 2**31],
  "optim.lr": [-1.0, float("nan"), float("inf"), 1e39, True, "1"],
  "optim.eps": [0.0, 1e-50],
  "optim.betas": [(0.9,), (0.9, 1.0), "(0.9, 0.95)", (0.9, float("nan")), (0.9, "0.95")],
  "optim.warmup_ratio": [1.0, -0.1],
  "objective.num_iterations": [0, 2**31],
  "objective.loss_weights": ["1,1", (1.0, -1.0), (0.0, 0.0), (1.0,), 1.0, (1.0, float("inf"))],
  "model.scan_unroll": [-1, 10**12],
  "model.head_chunk": [0, 2**31],
  "model.remat": ["mpl", "", None],
  "mesh.data": [0, -2, 2**31],
  "eval.generate_tokens": [0, 2**31],
  "log.profile_steps": [(3, 2), (0, 2), (-1, 2), (1,), (1, 2, 3), "1,2"],
  "log.logger": ["console", ("consol",), (1,)],
  "data.train_files": ["", "a\0b", "\ud800", 3, None],
  "data.pack": [1, "yes", None],
  # What JAX takes for the seed 0 is no other seed.
  "seed": [-1, 2**32, 2**64, 1.0, True, 10**5000],
}
CASES = [(name, value) for name, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda v: key_lib.shown(v)[:20])
def test_a_value_out_of_its_declared_range_is_refused_by_name(name, value):
  with pytest.raises(UserError) as error:
    changed(name, value)
  assert f"config.{name}" in str(error.value) or name == "optim.batch_size"
  assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_largest_seed_is_one_of_its_own():
  import jax
  import numpy as np

  assert changed("seed", 2**32 - 1).seed == 2**32 - 1
  keys = {tuple(np.asarray(jax.random.key_data(jax.random.key(s)))) for s in (0, 1, 2**32 - 1)}
  assert len(keys) == 3


def test_more_tokens_than_int32_counts_are_refused_together():
  message = refusal("--config.optim.batch_size=65536", "--config.data.max_length=65536")
  assert "batch_size=65536" in message and "max_length=65536" in message


def test_a_profile_beyond_the_run_is_refused():
  message = refusal("--config.optim.total_steps=5", "--config.log.profile_steps=(4, 6)")
  assert "(4, 6)" in message and "outside the run's steps 1 to 5" in message
  assert parse("--config.log.profile_steps=(4, 6)").log.profile == (4, 6)
