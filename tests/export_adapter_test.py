"""From the workdir of a run with an adapter to releases, and back by `load`."""

import json
import shutil
from pathlib import Path

import hf_fixtures
import jax
import numpy as np
import pytest
import transformers
from adapter_fixtures import AdapterRun, random_adapter
from hf_export_test import _script
from sampler_fixtures import greedy

import refine_jax
from refine_jax.decoding import loading
from refine_jax.errors import UserError
from refine_jax.hf import model_files
from refine_jax.hf.export_adapter import export_adapter
from refine_jax.hf.export_step import export_step
from refine_jax.model import adapters

PROMPT = [5, 9, 30]


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
  return AdapterRun(tmp_path_factory.mktemp("gated"), "gated")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
  return AdapterRun(tmp_path_factory.mktemp("lora"), "lora")


def assert_same(model, run):
  jax.tree.map(np.testing.assert_array_equal, model.params, run.params)
  assert model.adapter.shape == run.adapter.shape
  jax.tree.map(np.testing.assert_array_equal, model.adapter.factors, run.adapter.factors)
  assert (model.refinement.noise_token, model.refinement.block_size) == (7, 4)


def files_of(directory, pattern="*") -> dict:
  return {p.name: p.read_bytes() for p in directory.glob(pattern) if p.is_file()}


def test_a_gated_export_holds_the_base_bit_for_bit_and_the_adapter(gated, tmp_path, monkeypatch):
  output = tmp_path / "out"
  assert not _export(monkeypatch, gated, output)
  weights = files_of(gated.base, "*.safetensors*")
  assert len(weights) > 2 and files_of(output, "*.safetensors*") == weights
  assert (output / "config.json").read_bytes() == (gated.base / "config.json").read_bytes()
  # It may be moved: nothing in it names a place of this machine, but the card's configuration.
  shutil.move(output, tmp_path / "moved")
  output = tmp_path / "moved"
  assert str(gated.base) not in (output / "adapter" / "adapter_config.json").read_text()
  model = refine_jax.load(output)
  assert_same(model, gated)
  want = greedy(gated.torch_model, PROMPT, 12)
  out = refine_jax.generate(model, [PROMPT], max_new_tokens=12, eos_token_id=2, noise_token=7)
  assert out.tokens == [want]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
  assert greedy(theirs, PROMPT, 12) == want
  assert (output / "custom_generate" / "generate.py").is_file()
  card = (output / "README.md").read_text()
  assert "--uno-lora-path THIS_DIRECTORY/adapter --speculative-num-draft-tokens 16" in card
  assert "as they were" in card and "Every noise token is the EOS" in card


def test_a_base_that_transformers_5_wrote_is_the_same_model_to_4(tmp_path):
  base, _ = hf_fixtures.tiny_hf_model("llama", tmp_path, rope_theta=500.0)
  written = json.loads((base / "config.json").read_text())
  assert "rope_theta" not in written and written["rope_parameters"]["rope_theta"] == 500
  model = loading.load(base)
  refinement = {"noise_token": 7, "block_size": 4}
  model_files.save_model_files(
    base, hf_fixtures.words_tokenizer(), tmp_path / "files", refinement=refinement
  )
  output = export_adapter(
    random_adapter(model.config),
    tmp_path / "files",
    tmp_path / "out",
    base=str(base),
    how="copy",
    fingerprint="",
  )
  values = json.loads((output / "config.json").read_text())
  assert values["rope_theta"] == 500 and values.items() >= written.items()


def test_a_reference_holds_no_weights_and_knows_its_base(gated, tmp_path, monkeypatch):
  output = tmp_path / "out"
  assert not _export(monkeypatch, gated, output, "--base=reference", "--dtype=bfloat16")
  assert not files_of(output, "*.safetensors*")
  model = refine_jax.load(output)
  jax.tree.map(np.testing.assert_array_equal, model.params, gated.params)
  stored = model.adapter.factors["layers"]["mlp"]["up"]["b"]
  want = gated.adapter.factors["layers"]["mlp"]["up"]["b"]
  np.testing.assert_allclose(stored, want, rtol=2**-8)


def test_another_base_is_refused(gated, tmp_path, monkeypatch):
  output = tmp_path / "out"
  assert not _export(monkeypatch, gated, output, "--base=reference")
  other, _ = hf_fixtures.tiny_hf_model("qwen3", tmp_path, seed=3)
  path = output / "generation_config.json"
  values = json.loads(path.read_text())
  values["refinement"]["base"] = str(other)
  path.write_text(json.dumps(values))
  with pytest.raises(UserError, match="other weights"):
    refine_jax.load(output)
  workdir = shutil.copytree(gated.workdir, tmp_path / "run")
  assert_same(refine_jax.load(workdir), gated)
  with monkeypatch.context() as patch:
    patch.setattr(loading.sources.hf_weights, "find", lambda name: other)
    with pytest.raises(UserError, match="other weights"):
      refine_jax.load(workdir)


def test_each_step_of_a_run_with_an_adapter_exports_a_reference(gated):
  output = export_step(gated.workdir, 7, gated.adapter.factors, identity=gated.identity)
  assert_same(refine_jax.load(output), gated)
  assert not files_of(output, "*.safetensors*")


def test_a_lora_run_exports_and_loads_merged(lora, tmp_path, monkeypatch):
  assert not _export(monkeypatch, lora, tmp_path / "merged", "--dtype=float32")
  assert not _export(monkeypatch, lora, tmp_path / "peft", "--base=reference")
  want = adapters.merge(lora.params, lora.adapter.factors, lora.adapter.shape)
  for place in (tmp_path / "merged", tmp_path / "peft", lora.workdir):
    model = refine_jax.load(place)
    assert model.adapter is None and model.refinement.noise_token == 7
    jax.tree.map(np.testing.assert_array_equal, model.params, want)
  assert {p.name for p in (tmp_path / "peft").glob("*.safetensors")} == {
    "adapter_model.safetensors"
  }
  assert "adapter" not in json.loads((tmp_path / "merged" / "generation_config.json").read_text())


@pytest.mark.parametrize(
  ("kind", "how", "message"),
  [("lora", "copy", "merge or reference"), ("gated", "merge", "copy or reference")],
)
def test_a_base_that_an_adapter_cannot_have_is_one_line(
  request, kind, how, message, tmp_path, monkeypatch, capsys
):
  run = request.getfixturevalue(kind)
  assert _export(monkeypatch, run, tmp_path / "out", f"--base={how}") == 1
  error = capsys.readouterr().err.strip()
  assert message in error and "\n" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("key", "value"),
  [("adapter", "../elsewhere"), ("adapter", 3), ("base", ""), ("base_fingerprint", [1])],
)
def test_a_damaged_record_of_the_adapter_is_named(gated, tmp_path, key, value):
  directory = shutil.copytree(gated.workdir / "model", tmp_path / "model")
  path = Path(directory) / "generation_config.json"
  values = json.loads(path.read_text())
  values["refinement"] |= {"adapter": "adapter", key: value}
  path.write_text(json.dumps(values))
  with pytest.raises(UserError, match=key):
    refine_jax.load(directory)


def _export(monkeypatch, run, output, *arguments):
  return _script(monkeypatch, f"--workdir={run.workdir}", f"--output={output}", *arguments)
