"""Says what a run would take: python -m refine_jax.plan --config=FILE --device=h100:8 [--json]."""

import json
import logging
import sys

from absl import flags

from refine_jax.cli import entry_point
from refine_jax.config import command_line, from_config_dict
from refine_jax.errors import UserError
from refine_jax.planning import devices

_USAGE = """\
Says what a run would take on devices that are not here: memory, traffic, speed.

  python -m refine_jax.plan --config=FILE[:RECIPE] --device=DEVICE [--config.KEY=VALUE ...]

  --device=DEVICE         h100:8, v5e:2x4, v6e:4x4, v5p:2x2x2, v4:2x2x2; cpu:8 to try it out.
  --examples=N            Examples of a packed row, all of one length (4).
  --efficiency=X          The share of a device's peak that arithmetic reaches (0.5).
  --decode_rows=N         Rows of a pass of decoding, on one device; 0: leave it out (8).
  --decode_places=N       Tokens that each of them has room for (4096).
  --json                  End with one JSON object on a line.

Keys of the config are those of a run; no data, tokenizer or weights are read, but config.json is.
"""


def main(argv: list[str]) -> int:
  """Plans as the arguments say; returns the exit status: 0, or 1 where it does not fit.

  Raises:
    UserError: an argument, a key or a value that is not right; what compiles is not installed.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("device", None, "", flag_values=values)
  flags.DEFINE_integer("examples", 4, "", lower_bound=1, flag_values=values)
  flags.DEFINE_float("efficiency", 0.5, "", lower_bound=0.01, upper_bound=1, flag_values=values)
  flags.DEFINE_integer("decode_rows", 8, "", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("decode_places", 4096, "", lower_bound=256, flag_values=values)
  flags.DEFINE_bool("json", False, "", flag_values=values)
  config, rest = command_line.parse(argv, values)
  if len(rest) > 1:
    raise UserError(f"Unexpected argument {rest[1]!r}; options start with --.")
  if not values.device:
    raise UserError("--device is missing; name one such as h100:8 or v5e:2x4.")
  wanted = devices.parse(values.device)
  checked = from_config_dict(config)
  devices.prepare(wanted)
  # After that: these import what may ask JAX for its devices.
  from refine_jax.hf import config as hf_config
  from refine_jax.hf import weights as hf_weights
  from refine_jax.planning import plan, program, report

  logging.getLogger("jax").setLevel(logging.ERROR)
  directory = hf_weights.find(checked.model.pretrained or checked.model.config, weights=False)
  length = checked.data.max_length
  made = plan.make(
    checked,
    hf_config.read_model_config(directory),
    wanted,
    devices.find(wanted),
    rows=program.Rows(length, min(values.examples, length) if checked.data.pack else 1),
    efficiency=values.efficiency,
    decode=(values.decode_rows, values.decode_places) if values.decode_rows else None,
  )
  for line in report.lines(made):
    print(line)
  if values.json:
    print(json.dumps(report.as_json(made)))
  return 1 if made.memory.fits is False else 0


@entry_point
def run() -> int | None:
  if {"--help", "-help", "-h", "--helpfull"} & set(sys.argv[1:]):
    print(_USAGE, end="")
    return 0
  return main(sys.argv)
