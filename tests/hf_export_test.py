"""From a run's workdir to a release: the script, the per-step export, the model card."""

import json
import runpy
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from refine_jax.checkpoint import checkpointer
from refine_jax.checkpoint.checkpointer import Checkpointer
from refine_jax.decoding import loading
from refine_jax.errors import UserError
from refine_jax.hf import model_files
from refine_jax.hf.card import model_card
from refine_jax.hf.export_step import export_step
from tests.hf_fixtures import random_ids, tiny_hf_model, torch_logits

SCRIPT = Path(__file__).parent.parent / "scripts" / "export_hf.py"
RUN_CONFIG = {
  "model": {"pretrained": "somebody/tiny"},
  "objective": {"num_iterations": 2, "loss_weights": [1.0, 0.5]},
  "noise": {"noise_min": 0.1, "noise_max": 0.9},
}


def _tokenizer():
  words = {f"w{i}": i for i in range(61)}
  inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token="w1", pad_token="w2", unk_token="w0"
  )
  tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w3 {% endfor %}"
  return tokenizer


@pytest.fixture
def run(tmp_path):
  """(workdir with a checkpoint of step 7, the model that was saved there)."""
  directory, torch_model = tiny_hf_model("qwen3", tmp_path)
  workdir = tmp_path / "run"
  workdir.mkdir()
  model_files.save_model_files(directory, _tokenizer(), workdir / "model")
  (workdir / "config.json").write_text(json.dumps(RUN_CONFIG))
  lines = [
    {"step": 5, "loss_total": 2.5},
    {"step": 7, "loss_total": 1.25},
    {"step": 7, "eval/loss_total": 1.5},
    {"step": 9, "loss_total": 0.125},
  ]
  text = "\n".join(map(json.dumps, lines)) + '\n{"step": 9, "lo'  # as a killed run leaves it
  (workdir / "metrics.jsonl").write_text(text)
  params = loading.load(directory).params
  writer = Checkpointer(workdir, max_to_keep=2)
  iterator = iter(grain.MapDataset.source([1, 2, 3]).to_iter_dataset())
  writer.save(7, {"params": params, "step": np.int32(7)}, iterator, RUN_CONFIG, {})
  writer.close()
  return workdir, params, torch_model


def _script(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
  with pytest.raises(SystemExit) as end:
    runpy.run_path(str(SCRIPT), run_name="__main__")
  return end.value.code


def test_the_script_writes_what_transformers_loads(run, tmp_path, monkeypatch):
  workdir, _, torch_model = run
  output = tmp_path / "out"
  code = _script(monkeypatch, f"--workdir={workdir}", f"--output={output}", "--dtype=float32")
  assert not code
  ids = random_ids((2, 12))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
  np.testing.assert_array_equal(torch_logits(theirs.eval(), ids), torch_logits(torch_model, ids))
  tokenizer = transformers.AutoTokenizer.from_pretrained(output)
  assert tokenizer("w5 w9")["input_ids"] == [5, 9] and tokenizer.eos_token_id == 1
  assert tokenizer.chat_template == _tokenizer().chat_template
  code = Path(model_files.__file__).parent / "custom_generate"
  written = {p.name: p.read_bytes() for p in (output / "custom_generate").iterdir()}
  assert written == {p.name: p.read_bytes() for p in code.glob("*.py")} and "generate.py" in written


def test_a_used_output_or_an_absent_step_is_one_line(run, tmp_path, monkeypatch, capsys):
  workdir, *_ = run
  cases = [
    ([f"--output={workdir}"], "not empty"),
    ([f"--output={tmp_path / 'new'}", "--step=3"], "no step 3"),
  ]
  for arguments, named in cases:
    assert _script(monkeypatch, f"--workdir={workdir}", *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and named in error[0]


def test_a_workdir_loads_as_its_checkpoint(run):
  workdir, params, _ = run
  model = loading.load(workdir)
  jax.tree.map(np.testing.assert_array_equal, model.params, params)
  assert model.require_tokenizer().eos_token_id == 1
  with pytest.raises(UserError, match="step 3"):
    loading.load(workdir, step=3)
  with pytest.raises(UserError, match="step=7"):
    loading.load(workdir / "model", step=7)


def test_a_checkpoint_that_is_not_finite_is_refused_by_its_leaf(run, monkeypatch):
  workdir, params, _ = run
  broken = {"final_norm": {"scale": np.full(3, np.nan, np.float32)}}
  monkeypatch.setattr(checkpointer, "restore_params", lambda *_: (params | broken, 7))
  with pytest.raises(UserError, match="step 7 of .*: final_norm/scale holds values"):
    loading.load(workdir)


def test_each_step_exports_beside_the_checkpoints(run):
  workdir, params, _ = run
  output = export_step(workdir, 7, params, dtype="float32")
  assert output == workdir / "global_step_7" / "huggingface"
  jax.tree.map(np.testing.assert_array_equal, loading.load(output).params, params)


def test_the_card_has_base_metrics_of_that_step_and_config(run):
  card = model_card(run[0], 7)
  front = card.split("---")[1]
  assert "base_model: somebody/tiny" in front and "- refine_jax" in front
  assert "| loss_total | 1.2500 |" in card and "| eval/loss_total | 1.5000 |" in card
  assert '"num_iterations": 2' in card and "AutoModelForCausalLM" in card
  (run[0] / "metrics.jsonl").unlink()
  assert "## Metrics" not in model_card(run[0], 7)


def test_model_files_already_there_are_kept(run, tmp_path):
  other, _ = tiny_hf_model("llama", tmp_path, seed=5)
  before = (run[0] / "model" / "config.json").read_bytes()
  model_files.save_model_files(other, None, run[0] / "model")
  assert (run[0] / "model" / "config.json").read_bytes() == before


def test_an_export_ends_and_talks_as_the_training_did(tmp_path):
  """The tokenizer's EOS among those that end an answer; the template that the config gave."""
  directory, _ = tiny_hf_model("llama", tmp_path, eos_token_id=5)
  tokenizer = _tokenizer()
  tokenizer.chat_template = None
  model_files.save_model_files(
    directory, tokenizer, tmp_path / "files", chat_template="{{ messages }}"
  )
  saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "files")
  assert saved.chat_template == "{{ messages }}" and tokenizer.chat_template is None
  ends = json.loads((tmp_path / "files" / "generation_config.json").read_text())["eos_token_id"]
  assert ends == [5, 1]
  model_files.save_model_files(
    directory, _tokenizer(), tmp_path / "own", chat_template="{{ messages }}"
  )
  saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
  assert saved.chat_template == _tokenizer().chat_template


def test_a_name_that_is_no_directory_is_one_line(tmp_path, monkeypatch):
  for name in (str(tmp_path / "absent"), "somebody/absent-model"):
    with pytest.raises(UserError, match="absent"):
      loading.load(name)
  monkeypatch.chdir(tmp_path)
  Path("notes").write_text("a file, and no name to ask the hub for")
  with pytest.raises(UserError, match="notes is not a directory"):
    loading.load("notes")
