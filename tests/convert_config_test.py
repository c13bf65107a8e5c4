"""refine-jax convert-config: each key of the PyTorch original's YAML, or why it is left out."""

import sys
from pathlib import Path

import pytest

from refine_jax import convert_config
from refine_jax.config import command_line, from_config_dict
from refine_jax.errors import UserError

ROOT = Path(__file__).parents[1]
# The original's documented keys, with values that are nobody's defaults.
SAMPLE = """\
data:
  train_files: [a.parquet, b.parquet]
  val_files: val.parquet
  prompt_key: question
  response_key: answer
  max_length: 1024
  truncation: left
  micro_batch_size_per_gpu: 4
  pad_token_id: 0
model:
  partial_pretrain: some/model
  enable_gradient_checkpointing: false
  tensor_parallel_size: 2
  cpu_offload: false
optim:
  lr: 3e-5
  betas: [0.8, 0.99]
  weight_decay: 0.02
  warmup_steps_ratio: 0.1
  clip_grad: 0.5
  gradient_accumulation_steps: 16
trainer:
  total_epochs: 2
  save_checkpoint_steps: 500
  max_ckpt_to_keep: 5
  default_local_dir: checkpoints/exp
  project_name: proj
  experiment_name: exp
  logger: [console, wandb]
  resume_mode: resume_path
  resume_from_path: runs/older
  max_debug_steps: 3
iterative:
  num_iterations: 3
  noise_min: 0.2
  noise_max: 0.8
  loss_weights: [1.0, 0.5, 0.25]
"""


def values_of(tmp_path, text, *overrides):
  path = tmp_path / "iterative_refine.yaml"
  path.write_text(text)
  return convert_config.read(path, list(overrides))


def config_of(tmp_path, values, recipe="", **options):
  """What a run of the converted file would get."""
  path = tmp_path / "mine.py"
  path.write_text(convert_config.as_python("iterative_refine.yaml", values, **options))
  return from_config_dict(command_line.load_config(f"{path}{recipe}"))


def test_every_key_of_the_original_is_a_line_or_says_why_not(tmp_path):
  values = values_of(tmp_path, SAMPLE)
  assert set(values) == set(convert_config.RULES) - {"model.trust_remote_code"}
  c = config_of(tmp_path, values)
  assert (c.data.train_files, c.data.val_files) == ("a.parquet,b.parquet", "val.parquet")
  assert (c.data.prompt_key, c.data.response_key) == ("question", "answer")
  assert (c.data.max_length, c.data.truncation) == (1024, "left")
  assert (c.model.pretrained, c.model.remat, c.mesh.tensor) == ("some/model", "none", 2)
  assert (c.optim.lr, c.optim.betas, c.optim.weight_decay) == (3e-5, (0.8, 0.99), 0.02)
  assert (c.optim.warmup_ratio, c.optim.clip_grad, c.optim.total_epochs) == (0.1, 0.5, 2)
  assert (c.optim.batch_size, c.optim.accumulation) == (4 * 16, 16)
  assert (c.checkpoint.save_every, c.checkpoint.max_ckpt_to_keep) == (500, 5)
  assert (c.checkpoint.resume_mode, c.checkpoint.resume_from_path) == ("resume_path", "runs/older")
  assert (c.log.project_name, c.log.experiment_name) == ("proj", "exp")
  assert c.log.logger == ("console", "wandb")
  assert (c.objective.num_iterations, c.objective.loss_weights) == (3, (1.0, 0.5, 0.25))
  assert (c.noise.noise_min, c.noise.noise_max) == (0.2, 0.8)
  text = convert_config.as_python("x.yaml", values)
  for name in ("data.pad_token_id", "model.cpu_offload", "trainer.max_debug_steps"):
    assert f"# {name} = " in text
  assert "--workdir='checkpoints/exp'" in text


def test_the_converted_file_takes_recipes(tmp_path):
  c = config_of(tmp_path, values_of(tmp_path, SAMPLE), ":gated")
  assert (c.adapter.kind, c.objective.num_iterations, c.optim.lr) == ("gated", 1, 5e-4)
  assert c.data.max_length == 1024


def test_many_gpus_make_the_batch_and_split_the_parameters(tmp_path):
  c = config_of(tmp_path, values_of(tmp_path, SAMPLE), gpus=4)
  assert (c.optim.batch_size, c.optim.micro_batch) == (4 * 16 * 4, 16)
  assert (c.mesh.data, c.mesh.fsdp, c.mesh.tensor) == (1, -1, 2)


def test_what_the_original_takes_by_default_makes_the_batch(tmp_path):
  text = "data: {train_files: a}\nmodel: {partial_pretrain: m}\n"
  c = config_of(tmp_path, values_of(tmp_path, text))
  assert (c.optim.batch_size, c.optim.accumulation) == (2 * 64, 64)


def test_the_commands_own_values_come_last(tmp_path):
  values = values_of(tmp_path, SAMPLE, "optim.lr=1e-4", "+trainer.logger=[console]")
  c = config_of(tmp_path, values)
  assert (c.optim.lr, c.log.logger) == (1e-4, ("console",))


def test_what_is_left_out_is_said_on_stderr_too(tmp_path, monkeypatch, capsys):
  path = tmp_path / "a.yaml"
  path.write_text(
    "optim: {lr: '${x.y}', lrr: 1}\ntrainer: {logger: [console, other], project_name: null}\n"
  )
  monkeypatch.setattr(sys, "argv", ["x", str(path), f"--output={tmp_path}/mine.py"])
  for status in (0, 1):
    with pytest.raises(SystemExit) as end:
      convert_config.main()
    assert (end.value.code or 0) == status
  said = capsys.readouterr().err
  assert "optim.lr: it refers to other values" in said
  assert "optim.lrr: no key of the original that is known here; Did you mean 'optim.lr'?" in said
  assert "there is no 'other' here" in said and "project_name: it is empty" in said
  assert "train_files is empty" in said and "is there already" in said


@pytest.mark.parametrize(
  "text, overrides, words",
  [
    ("a: [", [], "line 1: it is no YAML"),
    ("- a\n", [], "holds no sections"),
    ("", [], "holds no sections"),
    ("data: {max_length: many}", [], "data.max_length='many'"),
    ("data: {max_length: 0}", [], "at least 2"),
    ("data: {truncation: middle}", [], "one of"),
    ("optim: {lr: fast}", [], "optim.lr='fast'"),
    ("optim: {gradient_accumulation_steps: 0}", [], "gradient_accumulation_steps=0"),
    ("data: {max_length: 2024-01-01}", [], "datetime"),
    ("a: 1", ["lr"], "is no KEY=VALUE"),
    ("a: 1", ["=3"], "is no KEY=VALUE"),
    ("a: 1", ["x=["], "is no KEY=VALUE"),
    ("a: !!python/object:os.system {}", [], "it is no YAML"),
  ],
)
def test_what_is_wrong_is_one_line(tmp_path, text, overrides, words):
  with pytest.raises(UserError) as error:
    convert_config.convert(values_of(tmp_path, text, *overrides))
  assert words in str(error.value)


def test_names_and_values_of_the_yaml_are_no_code(tmp_path):
  text = (
    '"x\\n  raise SystemExit": "a\\nraise SystemExit"\ntrainer: {default_local_dir: "\\nraise X"}\n'
  )
  made = convert_config.as_python("a\nraise X", values_of(tmp_path, text))
  assert "\nraise" not in made and "\n  raise" not in made
  compile(made, "made", "exec")


def test_the_table_in_the_docs_is_that_of_the_code():
  page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
  assert convert_config.markdown() in page
