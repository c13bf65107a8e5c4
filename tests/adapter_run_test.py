"""From a run that trains an adapter to models that decode with it."""

import json

import hf_fixtures
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import write_parquet
from hf_export_test import _script
from sampler_fixtures import EOS, greedy

import refine_jax
from configs import base
from refine_jax import config as config_lib
from refine_jax.training import problems, train

PROMPT = [5, 9, 30]


def run(place, **changes):
  """(workdir, its base, the base in torch) after two steps."""
  model, theirs = hf_fixtures.tiny_hf_model("llama", place, num_hidden_layers=1)
  hf_fixtures.words_tokenizer().save_pretrained(model)
  write_parquet(place / "a.parquet", ["w3 w4"] * 40, ["w5 w6 w7"] * 40)
  config = base.get_config("gated")
  values = {
    "model.pretrained": str(model),
    "model.compute_dtype": "float32",
    "data.train_files": str(place / "a.parquet"),
    "data.max_length": 16,
    "data.pack": False,
    "data.chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    "noise.block_size": 4,
    "adapter.rank": 3,
    "adapter.alpha": 6.0,
    "optim.batch_size": 8,
    "optim.total_steps": 2,
    "optim.lr": 0.1,
    "checkpoint.save_hf": True,
    "log.logger": ("console",),
  }
  config.update_from_flattened_dict(values | changes)
  workdir = place / "run"
  assert train.run(config_lib.from_config_dict(config), str(workdir)) == 0
  return workdir, model, theirs


def test_a_gated_run_gives_models_with_the_text_of_its_base(tmp_path, monkeypatch, capsys):
  shown = []

  def evaluate(model, rows, score, *, noise_token=None, **options):
    shown.append((model.refinement.random_noise, model.refinement.noise_token, noise_token))
    return dict.fromkeys(("solved", "tokens_per_pass", "not_stopped"), 0), []

  monkeypatch.setattr(problems.evaluate, "evaluate", evaluate)
  table = pyarrow.table({"prompt": ["w3 w4"], "answer": ["7"]})
  pyarrow.parquet.write_table(table, tmp_path / "problems.parquet")
  changes = {"eval.generate_file": str(tmp_path / "problems.parquet"), "eval.generate_every": 2}
  workdir, directory, theirs = run(tmp_path, **changes, **{"noise.random": True, "noise.token": 4})
  # A noise token given to the sampler would stand in every place.
  assert shown == [(True, 4, None)]
  said = capsys.readouterr().out
  blocks = "blocks of 3 a row, which tile the responses"
  for words in ("GiB of the base", "rank 3", "random noise tokens", blocks):
    assert words in said
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert {"loss_draft", "accuracy_draft", "drafts_per_token"} <= records[0].keys()
  assert records[0]["drafts_per_token"] > 0
  assert not any("clean" in name or "corrupted" in name for name in records[0])
  output = tmp_path / "out"
  assert not _script(monkeypatch, f"--workdir={workdir}", f"--output={output}")
  want, factors = greedy(theirs, PROMPT, 12), []
  for place in (workdir, workdir / "global_step_2" / "huggingface", output):
    model = refine_jax.load(place)
    out = refine_jax.generate(model, [PROMPT], max_new_tokens=12, eos_token_id=EOS)
    assert out.tokens == [want]
    assert model.refinement.random_noise and model.refinement.block_size == 4
    base_params = refine_jax.load(directory).params
    jax.tree.map(np.testing.assert_array_equal, model.params, base_params)
    factors.append(model.adapter.factors)
  jax.tree.map(lambda *xs: [np.testing.assert_array_equal(xs[0], x) for x in xs], *factors)
  assert np.any(factors[0]["layers"]["mlp"]["up"]["b"])  # it was trained


@pytest.mark.slow
def test_a_lora_run_gives_models_with_the_adapter_merged(tmp_path):
  changes = {"adapter.kind": "lora", "objective.clean_weight": 1.0}
  workdir, directory, _ = run(tmp_path, **changes)
  models = [refine_jax.load(p) for p in (workdir, workdir / "global_step_2" / "huggingface")]
  jax.tree.map(np.testing.assert_array_equal, *(m.params for m in models))
  before = refine_jax.load(directory).params["layers"]["mlp"]["up"]["kernel"]
  assert np.any(before != models[0].params["layers"]["mlp"]["up"]["kernel"])
