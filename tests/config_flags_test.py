"""Command lines and config files: flags, recipes, and what is said of those that are wrong."""

from pathlib import Path

import pytest
from absl import flags
from config_fixtures import changed, parse, refusal

from configs import base
from refine_jax import main
from refine_jax.config.recipes import MEANINGS
from refine_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_flags_change_a_config_by_the_types_of_its_keys():
  c = parse(
    "--config.optim.lr=2e-5",
    "--config.optim.batch_size=6",
    "--config.optim.accumulation",
    "2",
    "--noconfig.data.pack",
    "--config.objective.loss_weights=(0.5, 2)",
    "--config.log.logger=console",
    "--config.log.logger=wandb",
    "--config.data.val_files=",
  )
  assert (c.optim.lr, c.optim.batch_size, c.optim.micro_batch) == (2e-5, 6, 3)
  assert c.objective.loss_weights == (0.5, 2.0) and c.log.logger == ("console", "wandb")
  assert c.data.pack is False and c.data.val_files == ""


def test_the_last_of_two_values_counts_and_the_config_may_come_last(tmp_path):
  c = parse("--config.seed=1", "--config.seed=2", f"--config={ROOT}/configs/tiny.py", config=None)
  assert c.seed == 2
  (tmp_path / "flags").write_text("--config.seed=3\n")
  assert parse(f"--flagfile={tmp_path}/flags").seed == 3


NEAREST = {
  "--config.optim.lrr=1": "'optim.lr'",
  "--config.optm.lr=1": "'optim'",
  "--config.lr=1": "'optim.lr'",
  "--config.batchsize=1": "'optim.batch_size'",
  "--config.log.resume_mod=x": "'checkpoint.resume_mode'",
  "--noconfig.data.pak": "'data.pack'",
}


@pytest.mark.parametrize("argument", NEAREST)
def test_an_unknown_key_is_named_with_the_nearest(argument):
  message = refusal(argument)
  assert argument in message and f"did you mean {NEAREST[argument]}?" in message


@pytest.mark.parametrize("argument", ["--config.optim.lr.x=1", "--config.optim.betas[0]=0.5"])
def test_a_part_of_a_value_is_no_key(argument):
  assert f"{argument}: optim." in refusal(argument) and "as a whole" in refusal(argument)


def test_an_unknown_key_that_is_near_none_is_named():
  assert "--config.zzzz=3: there is no key 'zzzz'" in refusal("--config.zzzz=3")
  assert "--config.foo=3: there is no key 'foo'" in refusal("--config.foo=3")


def test_old_names_are_taken_with_one_line_on_stderr(capsys):
  assert changed("model.remat", "attention").model.remat == "save_attention"
  assert changed("model.remat", "mlp").model.remat == "save_attention_mlp"
  assert base.get_config("document") == base.get_config("uniform")
  lines = capsys.readouterr().err.splitlines()
  assert [line.startswith("warning: ") for line in lines] == [True, True, True]
  assert "'save_attention'" in lines[0] and "'uniform'" in lines[2]
  parse(config=f"{ROOT}/configs/tiny.py:uniform")
  assert capsys.readouterr().err == ""


def test_every_recipe_has_a_meaning_and_makes_a_config_that_is_right():
  configs = [parse(config=f"{ROOT}/configs/tiny.py:{recipe}") for recipe in MEANINGS]
  sections = {(c.noise, c.objective, c.adapter) for c in configs}
  assert len(sections) == len(MEANINGS)


BASE = "from configs import base\n"
FILES = {
  "syntax": ("def get_config(:\n  pass", "line 1: SyntaxError"),
  "raises": (f"{BASE}\ndef get_config():\n  return 1 / 0", "line 4: ZeroDivisionError"),
  "raises at import": ("x = {}['a']", "line 1: KeyError: 'a'"),
  "exits": ("import sys\nsys.exit('no')", "line 2: SystemExit: no"),
  "import": ("import there_is_no_such_module", "line 1: ModuleNotFoundError"),
  "null byte": ("x = '\0'", "null bytes"),
  "recursion": ("def get_config():\n  return get_config()", "RecursionError"),
  "returns nothing": (f"{BASE}\ndef get_config():\n  base.get_config()", "returned NoneType"),
  "returns a dict": ("def get_config():\n  return {}", "returned dict"),
  "no function": ("config = 1", "no function get_config"),
  "needs a recipe": (f"{BASE}\ndef get_config(r):\n  return base.get_config(r)", "needs a recipe"),
  "no keys": (
    "from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict()",
    "Config keys missing: seed, data",
  ),
  "a new key": (
    f"{BASE}\ndef get_config():\n  c = base.get_config().copy_and_resolve_references()\n"
    "  with c.unlocked():\n    c.optim.beta = 1\n  return c",
    "Unknown config key 'optim.beta'. Did you mean 'betas'?",
  ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_config_file_is_told_by_file_and_line(case, tmp_path):
  text, message = FILES[case]
  path = tmp_path / "mine.py"
  path.write_text(text)
  said = refusal(config=str(path))
  assert said.startswith(str(path)) and message in said


def test_a_recipe_for_a_file_that_takes_none_is_refused(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(f"{BASE}\ndef get_config():\n  return base.get_config()")
  assert "takes no recipe; leave out ':blocks'" in refusal(config=f"{path}:blocks")


def test_an_error_of_the_config_itself_is_told_as_it_is():
  assert "one of uniform, blocks, gated, ar_sft" in refusal(config=f"{ROOT}/configs/tiny.py:block")
  assert "Did you mean 'blocks'?" in refusal(config=f"{ROOT}/configs/tiny.py:block")


FLAGS = {
  "no config": ([], "--config is missing"),
  "no value": (["--config"], "--config has no value"),
  "no file": (["--config=nowhere.py:a"], "'nowhere.py'"),
  "a directory": (["--config=configs"], "'configs'"),
  "a number": ([f"--config={ROOT}/configs/tiny.py", "--config.seed=x"], "config.seed=x"),
  "no flag file": (["--flagfile=nowhere"], "nowhere"),
  "mistyped": (["--workdr=x"], "workdir"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_flag_is_one_line(case):
  arguments, message = FLAGS[case]
  assert message in refusal(*arguments, config=None)


def test_arguments_that_are_no_options_are_refused(monkeypatch):
  monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
  with pytest.raises(UserError, match="Unexpected argument 'seed=1'"):
    main.main(["main", f"--config={ROOT}/configs/tiny.py", "seed=1"])
