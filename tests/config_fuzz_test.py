"""Command lines and config values of any kind: a checked Config, or one line that refuses them."""

import json

import pytest
from absl import flags
from hypothesis import strategies as st

from refine_jax.config import Config, command_line, from_config_dict
from refine_jax.config.key import all_keys
from tests.config_test import ROOT, changed
from tests.fuzzing import fuzz, taken_or_refused, values

_NAMES = [key.name for key in all_keys(Config)]
_SECTIONS = sorted({name.partition(".")[0] for name in _NAMES})
_CONFIGS = [f"{ROOT}/configs/{name}" for name in ("tiny.py", "base.py:blocks", "llama3_8b.py:x")]

names = st.one_of(
  st.sampled_from(_NAMES + _SECTIONS),
  # Damaged: a letter more or less, another section, anything.
  st.builds(
    lambda n, i, c: n[:i] + c + n[i + 1 :],
    st.sampled_from(_NAMES),
    st.integers(0, 20),
    st.text(max_size=2),
  ),
  st.builds(lambda s, n: f"{s}.{n}", st.sampled_from(_SECTIONS), st.text(max_size=6)),
  st.text(max_size=12),
)
literals = st.one_of(
  st.integers().map(str),
  st.floats().map(str),
  st.sampled_from(["true", "False", "", "-1", "0", "1e400", "nan", "1_0", "0x10", "9" * 5000]),
  st.sampled_from(["(1,2)", "(1,", "1,2", "((" * 300, "[" * 3000, "{'a': 1}", "()", "(1.0,'a')"]),
  st.sampled_from(["\0", "a\nb", "\ud800", "~", "@x", "'", '"a" "b"', "$(x)", "%s", "x" * 5000]),
  values.map(repr),
  st.text(max_size=8),
)
arguments = st.one_of(
  st.builds(lambda d, n, v: f"{d}config.{n}={v}", st.sampled_from(["--", "-"]), names, literals),
  st.builds(lambda p, n: f"--{p}config.{n}", st.sampled_from(["", "no"]), names),
  st.sampled_from(["--config", "--config=", "--", "-", "--flagfile=nowhere", "--flagfile", "---x"]),
  st.builds(
    lambda n, v: f"--{n}={v}", st.sampled_from(["workdir", "config", "x", "undefok"]), literals
  ),
  literals,
)


def parse(argv: list[str]) -> Config:
  flag_values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "", flag_values=flag_values)
  return from_config_dict(command_line.parse(argv, flag_values)[0])


@fuzz(config=st.sampled_from(_CONFIGS), given=st.lists(arguments, max_size=5))
def test_any_command_line_is_a_config_or_one_line(config, given):
  result = taken_or_refused(parse, ["main", f"--config={config}", *given])
  if isinstance(result, Config):
    json.dumps(result.to_dict(), allow_nan=False).encode()


@fuzz(name=st.sampled_from(_NAMES), value=values | st.tuples(values, values))
def test_any_value_in_a_config_file_is_taken_as_it_is_or_refused(name, value):
  result = taken_or_refused(changed, name, value)
  if isinstance(result, Config):
    json.dumps(result.to_dict(), allow_nan=False).encode()


@fuzz(text=st.text() | st.text(alphabet="def get_config():\n return 1/0'\"\\"))
def test_any_config_file_is_a_config_or_one_line(text, tmp_path):
  path = tmp_path / "mine.py"
  path.write_bytes(text.encode(errors="surrogatepass"))
  assert not isinstance(taken_or_refused(command_line.load_config, str(path)), dict)


@pytest.mark.parametrize("value", ["[" * 3000, "9" * 5000, "(" * 100_000, "1e400", "nan"])
def test_a_value_that_breaks_parsers_is_one_line(value):
  for key in ("seed", "optim.lr", "objective.loss_weights", "mesh"):
    line = f"--config.{key}={value}"
    result = taken_or_refused(parse, ["main", f"--config={_CONFIGS[0]}", line])
    assert not isinstance(result, Config)
