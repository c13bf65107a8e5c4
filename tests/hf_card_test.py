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


def card_of(place, name, how=None, hub="me/model", **changes):
  config = recipe(name, **{"model.pretrained": "somebody/tiny"}, **changes)
  (place / "config.json").write_text(json.dumps(config))
  return model_card(place, 3, base=how, name=hub, dataset="me/data")


def code_of(card):
  """The blocks of Python in a card, joined."""
  return "\n".join(card.split("```python")[i].split("```")[0] for i in (1, 2))


def test_every_card_has_its_names_and_code_that_is_python(tmp_path):
  for name, how in (("blocks", None), ("document", None), ("ar_sft", None), ("gated", "copy")):
    card = card_of(tmp_path, name, how, **{"data.train_files": "/home/me/a.parquet"})
    front = card.split("---")[1]
    assert "- custom_generate" in front and "datasets:\n- me/data" in front
    assert f"base_model_relation: {'adapter' if how else 'finetune'}" in front
    assert 'custom_generate="me/model"' in card and "Data: me/data (`a.parquet`)." in card
    assert "/home/me" not in card.split("## Configuration")[0]
    compile(code_of(card), name, "exec")


def test_a_card_of_blocks_says_how_it_drafts(tmp_path):
  card = card_of(tmp_path, "blocks")
  assert "fine-tuned from somebody/tiny" in card and "A pass adds up to 16 tokens" in card
  assert "adapter" not in card.split("## Configuration")[0]


def test_a_card_of_the_document_claims_no_runs_of_noise(tmp_path):
  card = card_of(tmp_path, "document")
  assert "Drafts are what the last pass predicted past the verified text." in card
  assert "run of noise" not in card and "seldom right" not in card
  assert "seldom right" in card_of(tmp_path, "ar_sft")


def test_a_card_of_a_gated_run_says_what_is_the_bases_and_where_it_is(tmp_path):
  card = card_of(tmp_path, "gated", "copy", **{"noise.block_size": 8})
  assert "The base's weights are as they were" in card and "A pass adds up to 8 tokens" in card
  assert "fine-tuned" not in card and 'from_pretrained("me/model", dtype="auto")' in card
  assert "--model-path me/model --speculative-algorithm UNO" in card
  card = card_of(tmp_path, "gated", "reference")
  assert 'from_pretrained("somebody/tiny", dtype="auto")' in card
  assert 'custom_generate="me/model", export="me/model"' in card
  assert "The base's weights are not in here" in card


def test_a_card_of_a_peft_directory_promises_no_code(tmp_path):
  card = card_of(tmp_path, "blocks", "reference", **{"adapter.kind": "lora"})
  front = card.split("---")[1]
  assert "library_name: peft" in front and "custom_generate" not in card
