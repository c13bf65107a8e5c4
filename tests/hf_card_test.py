"""The model card tells what a run was trained for, whatever it was."""

import json

import pytest

from configs import base
from refine_jax.errors import UserError
from refine_jax.hf.card import describe_training, model_card


def recipe(name, **changes) -> dict:
  config = base.get_config(name)
  config.update_from_flattened_dict(changes)
  return json.loads(config.to_json())


def test_blocks_are_described_as_blocks():
  text = describe_training(recipe("blocks", **{"noise.token": 17}))
  assert "blocks of 16 tokens" in text and "15 drafts" in text and "token 17" in text
  assert "clean text has weight 1" in text and "0.85 times" in text
  assert "1 refinement round with loss weight 0.1" in text and "uniformly" not in text


def test_uniform_noise_is_described_with_its_rates_and_rounds():
  text = describe_training(recipe("document", **{"objective.loss_weights": (1.0, 0.5)}))
  assert "2 refinement rounds with loss weights 1, 0.5" in text
  assert "uniformly from [0.1, 0.9]" in text and "the tokenizer's EOS" in text
  assert "no next-token loss" in text and "block" not in text


def test_plain_fine_tuning_claims_no_refinement():
  text = describe_training(recipe("ar_sft"))
  assert "plain fine-tuning" in text and "round" not in text


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(recipe("blocks")))
  return tmp_path


def test_the_card_says_what_describes_the_training(workdir):
  assert describe_training(recipe("blocks")) in model_card(workdir, 3)


@pytest.mark.parametrize(
  "text", ["{}", '{"model": 3}', '{"model": {"pretrained": 5}, "objective": []}', "[]", "{"]
)
def test_a_workdir_without_a_runs_config_is_one_line(text, workdir):
  (workdir / "config.json").write_text(text)
  with pytest.raises(UserError, match="config.json"):
    model_card(workdir, 3)


def test_lines_of_metrics_that_are_none_are_passed_over(workdir):
  lines = ['{"step": 2, "loss_s0": 1.5, "loss_s1": null}', "[3]", '{"loss_s0": 9}', "3", '{"step']
  (workdir / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n")
  card = model_card(workdir, 3)
  assert "| loss_s0 | 1.5000 |" in card and "loss_s1 |" not in card


def test_a_base_that_is_a_local_path_is_no_hub_name(workdir, tmp_path):
  for name, shown in (("somebody/tiny", True), (str(tmp_path), False), ("~nosuch/x", False)):
    (workdir / "config.json").write_text(json.dumps(recipe("blocks", **{"model.pretrained": name})))
    assert ("base_model: " in model_card(workdir, 3)) == shown
