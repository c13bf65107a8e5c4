"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

import math
from typing import Any

from refine_jax.errors import UserError
from refine_jax.hf.families import Family
from refine_jax.hf.values import MOST, count, flag, number
from refine_jax.model.rope import RopeConfig
from refine_jax.quoting import shown

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
# Between these the frequencies of every position are finite in float32, and so are the logits.
_THETA = (2.0, 1e30)
_BOUNDS = {
  "factor": (1.0, 1e6),
  "low_freq_factor": (1e-6, 1e6),
  "high_freq_factor": (1e-6, 1e6),
  "attention_factor": (1e-3, 1e3),
  # transformers takes 0 for "not given"
  "beta_fast": (0.0, 1e6),
  "beta_slow": (0.0, 1e6),
  "mscale": (0.0, 1e3),
  "mscale_all_dim": (0.0, 1e3),
}
_BY_TYPE = ("full_attention", "sliding_attention")
_ORIGINAL = "original_max_position_embeddings"


def read_ropes(
  c: dict, family: Family, max_length: int, where: str
) -> tuple[RopeConfig, RopeConfig | None]:
  """The rotary embeddings that a config.json asks for, and those that sliding layers have.

  Args:
    c: the config's keys.
    max_length: max_position_embeddings.
    where: names the config in messages.

  Returns:
    both; the second is None where a family has one for all layers.

  Raises:
    UserError: an unsupported kind, an unknown, missing or impossible parameter, or spellings that
      disagree.
  """
  if family.sliding_rope_theta is None:
    return _read_rope(c, "rope_theta", family.rope_theta, max_length, where), None
  full, sliding = _by_type(c, where)
  full = {k: v for k, v in c.items() if k != "rope_parameters"} | {"rope_parameters": full}
  sliding = {"rope_local_base_freq": c.get("rope_local_base_freq"), "rope_parameters": sliding}
  ropes = (
    _read_rope(full, "rope_theta", family.rope_theta, max_length, where),
    _read_rope(sliding, "rope_local_base_freq", family.sliding_rope_theta, max_length, where),
  )
  if ropes[1].kind != "default":  # transformers 4 could not be told
    raise UserError(
      f"{where}: rope_type={ropes[1].kind!r} of sliding_attention is not supported; 'default' is."
    )
  return ropes


def _by_type(c, where) -> tuple:
  """The two entries of rope_parameters by layer type, None for what is not there."""
  p = c.get("rope_parameters")
  p = {} if p is None else p
  if not isinstance(p, dict) or not p.keys() <= set(_BY_TYPE):
    raise UserError(
      f"{where}: rope_parameters must be an object of {' and '.join(_BY_TYPE)}, not {shown(p)}."
    )
  return tuple(p.get(name) for name in _BY_TYPE)


def _read_rope(c, theta_key, default_theta, max_length, where) -> RopeConfig:
  spellings = [c.get(key) for key in ("rope_scaling", "rope_parameters")]
  spellings = [p for p in spellings if p is not None and p != {}]
  parsed = [_spelling(p, where) for p in spellings]
  if len(parsed) == 2 and parsed[0] != parsed[1]:
    raise UserError(f"{where}: rope_scaling and rope_parameters contradict each other.")
  kind, p = parsed[0] if parsed else ("default", {})
  given = [(c.get(theta_key), theta_key), *((x.get("rope_theta"), "rope_theta") for x in spellings)]
  thetas = {number(x, key, where, *_THETA) for x, key in given if x is not None}
  if len(thetas) > 1:
    raise UserError(
      f"{where}: {theta_key} is given as {' and as '.join(map(str, sorted(thetas)))}."
    )
  theta = thetas.pop() if thetas else default_theta
  original = _original_length(c, p, max_length, where)
  truncate = flag(p, "truncate", where, default=True)
  p: dict[str, Any] = {
    key: number(value, f"rope {key}", where, *_BOUNDS[key])
    for key, value in p.items()
    if key not in (_ORIGINAL, "truncate")
  }
  if kind == "yarn":
    p = _yarn(p, max_length, original, where) | {"truncate": truncate}
  if kind in ("yarn", "llama3"):
    p["original_length"] = original
  if kind == "llama3" and not p["low_freq_factor"] < p["high_freq_factor"]:
    raise UserError(f"{where}: rope low_freq_factor must be below high_freq_factor.")
  return RopeConfig(theta=theta, kind=kind, **p)


def _original_length(c, p, max_length, where) -> int:
  lengths = {count(x, _ORIGINAL, where) for x in (c, p) if x.get(_ORIGINAL) is not None}
  if len(lengths) > 1:
    raise UserError(f"{where}: {_ORIGINAL} is {' and '.join(map(str, sorted(lengths)))}.")
  return lengths.pop() if lengths else max_length


def _yarn(p, max_length, original, where) -> dict:
  """YaRN's parameters as RopeConfig wants them."""
  p = {key: value for key, value in p.items() if value or not key.startswith("beta")}
  if "factor" not in p:
    p["factor"] = number(max_length / original, "rope factor", where, *_BOUNDS["factor"])
  if not p.get("beta_fast", RopeConfig.beta_fast) > p.get("beta_slow", RopeConfig.beta_slow):
    raise UserError(f"{where}: rope beta_fast must be above beta_slow.")
  number(p["factor"] * original, "rope factor times original length", where, 1, MOST)
  p["attention_factor"] = _yarn_attention_factor(p)
  return {key: value for key, value in p.items() if not key.startswith("mscale")}


def _spelling(p, where) -> tuple[str, dict]:
  """(type, parameters without the base) of rope_scaling or rope_parameters."""
  if not isinstance(p, dict):
    raise UserError(f"{where}: rope parameters must be an object, not {shown(p)}.")
  if any(isinstance(v, dict) for v in p.values()):
    raise UserError(f"{where}: rope parameters that differ by layer type are not supported.")
  kind = p.get("rope_type", p.get("type", "default"))
  if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
    raise UserError(
      f"{where}: rope_type={shown(kind)} is not supported; supported are {', '.join(_ROPE_FIELDS)}."
    )
  required, optional = _ROPE_FIELDS[kind]
  rest = {k: v for k, v in p.items() if v is not None and k not in ("type", "rope_type")}
  rest.pop("rope_theta", None)
  partial = rest.pop("partial_rotary_factor", 1)
  if isinstance(partial, bool) or partial != 1:
    raise UserError(f"{where}: partial_rotary_factor={shown(partial)} is not supported.")
  for key in required:
    if key not in rest:
      raise UserError(f"{where}: rope_type={kind!r} needs {key}, which is missing.")
  for key in rest:
    if key not in required and key not in optional:
      raise UserError(
        f"{where}: rope parameter {shown(key)}={shown(rest[key])} is unknown for {kind!r}."
      )
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


def both_spellings(values: dict, family: Family) -> dict:
  """A config.json that can be read, with the spelling of transformers 4 and of 5."""
  new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
  own = family.sliding_rope_theta is not None
  full = (new.get("full_attention") or {}) if own else new
  theta = values.get("rope_theta") or full.get("rope_theta") or old.get("rope_theta")
  theta = theta or family.rope_theta
  kind, parameters = _spelling(old or full, "config.json")
  result = values | {"rope_theta": theta}
  result["rope_scaling"] = {"rope_type": kind, **parameters} if kind != "default" else None
  result["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **parameters}
  if own:
    local = (new.get("sliding_attention") or {}).get("rope_theta")
    local = values.get("rope_local_base_freq") or local or family.sliding_rope_theta
    sliding = {"rope_type": "default", "rope_theta": local}
    both = (result["rope_parameters"], sliding)
    result["rope_parameters"] = dict(zip(_BY_TYPE, both, strict=True))
    result["rope_local_base_freq"] = local
  return result
