"""The declared keys, and what is made of them: defaults, checks, --help, docs, flags."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from configs import base
from refine_jax import main
from refine_jax.config import (
  Config,
  NoiseConfig,
  OptimConfig,
  command_line,
  default_config,
  from_config_dict,
)
from refine_jax.config import key as key_lib
from refine_jax.config.describe import help_text, markdown
from refine_jax.config.recipes import MEANINGS
from refine_jax.errors import UserError
from refine_jax.model import remat

ROOT = Path(__file__).parents[1]
KEYS = {key.name: key for key in key_lib.all_keys(Config)}


def parse(*arguments: str, config: str | None = f"{ROOT}/configs/tiny.py") -> Config:
  """What a run of these arguments would get, with flags of its own."""
  first = [] if config is None else [f"--config={config}"]
  flag_values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "", flag_values=flag_values)
  parsed, rest = command_line.parse(["main", *first, *arguments], flag_values)
  assert rest == ["main"]
  return from_config_dict(parsed)


def refusal(*arguments: str, **options) -> str:
  with pytest.raises(UserError) as error:
    parse(*arguments, **options)
  assert "\n" not in str(error.value)
  return str(error.value)


def value_of(config: Config, name: str):
  for part in name.split("."):
    config = getattr(config, part)
  return config


def changed(name: str, value) -> Config:
  """The defaults with a model, files and one value more, of whatever type."""
  c = default_config().to_dict()
  c["data"]["train_files"], c["model"]["config"] = "x.parquet", "model"
  *section, last = name.split(".")
  (c[section[0]] if section else c)[last] = value
  return from_config_dict(c)


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
