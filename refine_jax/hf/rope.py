"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

import math

from refine_jax.errors import UserError
from refine_jax.model.rope import RopeConfig

# rope type -> its parameters: those it cannot do without, and the others.
_ROPE_FIELDS = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "llama3": (
    ("factor", "low_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings",),
  ),
  "yarn": (
    (),
    tuple(
      "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale"
      " mscale_all_dim truncate".split()
    ),
  ),
}


def read_rope(c: dict, max_length: int, where: str) -> RopeConfig:
  """The rotary embeddings that a config.json asks for.

  Args:
    c: the config's keys.
    max_length: max_position_embeddings.
    where: names the config in messages.

  Raises:
    UserError: an unsupported kind, an unknown or missing parameter, or spellings that disagree.
  """
  spellings = [c[key] for key in ("rope_scaling", "rope_parameters") if c.get(key)]
  parsed = [_spelling(p, where) for p in spellings]
  if len(parsed) == 2 and parsed[0] != parsed[1]:
    raise UserError(f"{where}: rope_scaling and rope_parameters contradict each other.")
  kind, p = parsed[0] if parsed else ("default", {})
  thetas = {x.get("rope_theta") for x in (c, *spellings)} - {None}
  if len(thetas) > 1:
    raise UserError(f"{where}: rope_theta is given as {' and as '.join(map(str, sorted(thetas)))}.")
  theta = number(thetas.pop() if thetas else 10000.0, "rope_theta", where)
  original = c.get("original_max_position_embeddings")
  inner = p.pop("original_max_position_embeddings", original)
  if original is not None and inner != original:
    raise UserError(f"{where}: original_max_position_embeddings is {original} and {inner}.")
  truncate = p.pop("truncate", True)
  p = {key: number(value, f"rope {key}", where) for key, value in p.items()}
  original_length = int(number(max_length if inner is None else inner, "original length", where))
  if kind == "yarn":
    p["factor"] = p.get("factor", max_length / original_length)
    p["attention_factor"] = _yarn_attention_factor(p)
    p["truncate"] = bool(truncate)
    for key in ("beta_fast", "beta_slow"):
      if not p.get(key):  # transformers takes 0 for "not given"
        p.pop(key, None)
    p.pop("mscale", None), p.pop("mscale_all_dim", None)
  if kind in ("yarn", "llama3"):
    p["original_length"] = original_length
  return RopeConfig(theta=theta, kind=kind, **p)


def _spelling(p, where):
  """(type, parameters without the base) of rope_scaling or rope_parameters."""
  if not isinstance(p, dict) or any(isinstance(v, dict) for v in p.values()):
    raise UserError(f"{where}: rope parameters that differ by layer type are not supported.")
  kind = p.get("rope_type", p.get("type", "default"))
  if kind not in _ROPE_FIELDS:
    raise UserError(
      f"{where}: rope_type={kind!r} is not supported; supported are {', '.join(_ROPE_FIELDS)}."
    )
  required, optional = _ROPE_FIELDS[kind]
  rest = {k: v for k, v in p.items() if v is not None and k not in ("type", "rope_type")}
  rest.pop("rope_theta", None)
  partial = rest.pop("partial_rotary_factor", 1)
  if partial != 1:
    raise UserError(f"{where}: partial_rotary_factor={partial} is not supported.")
  for key in required:
    if key not in rest:
      raise UserError(f"{where}: rope_type={kind!r} needs {key}, which is missing.")
  for key in rest:
    if key not in required and key not in optional:
      raise UserError(f"{where}: rope parameter {key}={rest[key]!r} is unknown for {kind!r}.")
  return kind, rest


def _yarn_attention_factor(p):
  """What cos and sin are multiplied by (arXiv:2309.00071, section 3.4; DeepSeek's mscale)."""

  def scale(weight):
    return 1.0 if p["factor"] <= 1 else 0.1 * weight * math.log(p["factor"]) + 1.0

  if "attention_factor" in p:
    return p["attention_factor"]
  if p.get("mscale") and p.get("mscale_all_dim"):
    return scale(p["mscale"]) / scale(p["mscale_all_dim"])
  return scale(1.0)


def both_spellings(values: dict) -> dict:
  """config.json's content with the spelling of transformers 4 and of 5, whichever is missing."""
  new, old = values.get("rope_parameters"), values.get("rope_scaling")
  theta = values.get("rope_theta") or (new or old or {}).get("rope_theta", 10000.0)
  kind, parameters = _spelling(old or new or {}, "config.json")
  result = dict(values, rope_theta=theta)
  if not new:
    result["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **parameters}
  if not old:
    result["rope_scaling"] = {"rope_type": kind, **parameters} if kind != "default" else None
  return result


def number(value, key: str, where: str) -> float:
  """`value` as a float, or UserError."""
  if type(value) not in (int, float) or not math.isfinite(value):
    raise UserError(f"{where}: {key} must be a number, not {value!r}.")
  return float(value)
