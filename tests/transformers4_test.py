"""Exports in transformers 4: tokenizer, model and custom_generate say there what they say here.

REFINE_JAX_TRANSFORMERS4 names a virtual environment with transformers 4.57 and torch; where it is
not there yet, or the variable is not set, one is made (pip, minutes).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import custom_generate_fixtures
import data_fixtures
import hf_fixtures
import pytest
import sampler_fixtures
import transformers4_reader
from adapter_fixtures import random_adapter

from refine_jax.decoding import loading
from refine_jax.hf.export import export
from refine_jax.hf.export_adapter import export_adapter
from refine_jax.hf.model_files import save_model_files, save_tokenizer
from refine_jax.text.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
RECORD = {"noise_token": 7, "block_size": 4}
# Where transformers 4 assumes another base of the rotary embeddings.
CHANGES = {"llama": {"rope_theta": 500.0}, "mistral": {"sliding_window": 6}}


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory):
  yield from custom_generate_fixtures.alone(tmp_path_factory)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
  """The interpreter of the environment."""
  place = os.environ.get("REFINE_JAX_TRANSFORMERS4") or tmp_path_factory.mktemp("environment") / "4"
  found = Path(place) / "bin" / "python"
  if not found.exists():
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install = [found, "-m", "pip", "install", "--quiet", "transformers==4.57.*", "torch", "jinja2"]
    subprocess.run(install, check=True)
  return found


def source(family, place):
  """A base as others leave it: its tokenizer as transformers 5 writes it, or in words of both."""
  tokenizer = data_fixtures.make_tokenizer()
  directory = sampler_fixtures.directory_for(tokenizer, place, family, **CHANGES.get(family, {}))
  tokenizer.chat_template = TEMPLATE
  if family in ("llama", "qwen3"):
    tokenizer.save_pretrained(directory)
  else:
    save_tokenizer(tokenizer, directory)
  return directory


@pytest.mark.slow
def test_transformers_4_reads_exports_as_5_does(tmp_path, python):
  outputs = []
  for family in hf_fixtures.FAMILIES:
    base = source(family, tmp_path / family)
    files, model = tmp_path / f"{family}-files", loading.load(base)
    save_model_files(base, load_tokenizer(base), files, refinement=RECORD)
    outputs.append(export(model.params, files, tmp_path / f"{family}-out", dtype="float32"))
    gated = export_adapter(
      random_adapter(model.config),
      files,
      tmp_path / f"{family}-gated",
      base=str(base),
      how="copy",
      fingerprint="",
    )
    outputs.append(gated)
  here = {str(path): transformers4_reader.read(str(path)) for path in outputs}
  reader = [python, transformers4_reader.__file__, *here]
  environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
  done = subprocess.run(reader, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-2000:]
  there = json.loads(done.stdout)
  assert there["version"].startswith("4.") and there["models"] == here
  for path, said in here.items():
    assert said["parallel"] == said["answer"], path
    assert len(said["answer"][0]) > len(said["chat"][0])
