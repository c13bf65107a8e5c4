"""The words of lm-evaluation-harness, read as options of ours: all of them, or refused by name."""

import difflib
import logging
import numbers

import jax

from refine_jax.decoding.options import Options, require
from refine_jax.errors import UserError

BATCH_SIZE = 16
DECODING = ("mode", "block_size", "draft", "tau", "refine_iter", "seed", "noise_token")
_MODEL_ARGS = ("pretrained", "batch_size", "max_gen_toks", "dtype", "device", "max_batch_size")

# Every name that backends of the harness know the number of new tokens by, the first that is given
# counts.
_MOST_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GEN_KWARGS = (*_MOST_NEW, "until", "do_sample", "temperature", "top_p", "top_k")
# Values of other names that ask for nothing.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1, "use_cache": True}
_HARNESS_DEVICE = "cuda:0"  # what the harness gives where nobody asked for a device
_BACKENDS = {"cuda": "gpu", "gpu": "gpu", "cpu": "cpu", "tpu": "tpu"}
_log = logging.getLogger(__name__)


def check_model_args(pretrained: object, device: object, options: dict) -> None:
  """Refuses what RefineLM cannot honour, before it loads a model.

  Raises:
    UserError: no model, an unknown name (with the nearest that is known), a value that cannot be.
  """
  known = (*_MODEL_ARGS, *DECODING)
  for name in options:
    if name in DECODING:
      continue
    if name in _GEN_KWARGS or name == "stop":
      raise UserError(f"--model_args {name} belongs into --gen_kwargs.")
    nearest = difflib.get_close_matches(name, known, n=1)
    raise UserError(
      f"--model_args {name} is not known"
      + (f"; do you mean {nearest[0]}?" if nearest else ".")
      + f" Known are {', '.join(known)}."
    )
  if not pretrained or not isinstance(pretrained, str):
    raise UserError("--model_args needs pretrained=DIR: a directory, a hub name or a workdir.")
  asked = device not in (None, _HARNESS_DEVICE)
  if asked and _BACKENDS.get(str(device)) != jax.default_backend():
    raise UserError(
      f"--device {device} is not what JAX runs on here ({jax.default_backend()}); leave it out, and"
      " choose with JAX_PLATFORMS and CUDA_VISIBLE_DEVICES."
    )
  Options(**options)


def read_batch_size(value: object, most: object = None) -> int:
  """Requests at a time: a number, or "auto" (and "auto:N"), which is not searched for here.

  Raises:
    UserError: anything else.
  """
  if isinstance(value, str) and value.partition(":")[0] == "auto":
    size = BATCH_SIZE if most is None else min(BATCH_SIZE, whole("max_batch_size", most))
    _log.warning("batch_size=%s is not searched for; it is %d.", value, size)
    return size
  return whole("batch_size", value)


def whole(name: str, value: object) -> int:
  """A number of at least 1, also as text.

  Raises:
    UserError: names what cannot be.
  """
  try:
    number = int(value) if isinstance(value, str | numbers.Integral) else 0
  except ValueError:
    number = 0
  good = number > 0 and not isinstance(value, bool)
  require(name, value, good, "a whole number of at least 1")
  return number


def read_gen_kwargs(given: dict, most_new: int) -> dict:
  """A request's generation arguments as options of `generation.generate`.

  Null is as good as absent. do_sample false is greedy whatever the temperature; without do_sample
  a temperature other than 0 samples.

  Args:
    most_new: new tokens where nothing is said of them.

  Raises:
    UserError: a name that is not supported, or a value that cannot be.
  """
  kwargs = {name: value for name, value in given.items() if value is not None}
  for name, value in kwargs.items():
    if name not in _GEN_KWARGS and not (name in _NEUTRAL and value == _NEUTRAL[name]):
      raise UserError(
        f"The generation argument {name}={value!r} is not supported; those that are:"
        f" {', '.join(_GEN_KWARGS)}. Leave it out of --gen_kwargs, or out of the task."
      )
  until = kwargs.get("until", [])
  until = [until] if isinstance(until, str) else until
  texts = isinstance(until, list | tuple) and all(isinstance(s, str) for s in until)
  require("until", until, texts, "a string or a list of strings")
  sample = kwargs.get("do_sample", _number(kwargs, "temperature", 0.0) != 0)
  require("do_sample", sample, isinstance(sample, bool), "true or false")
  result = {
    "stop": [s for s in until if s],
    "max_new_tokens": _most_new(kwargs, most_new),
    "temperature": _number(kwargs, "temperature", 1.0) if sample else 0.0,
  }
  if "top_p" in kwargs:
    result["top_p"] = _number(kwargs, "top_p", 1.0)
  if "top_k" in kwargs:
    # -1 is how others say "all".
    result["top_k"] = 0 if kwargs["top_k"] == -1 else kwargs["top_k"]
  Options(**result)
  return result


def _most_new(kwargs: dict, default: int) -> int:
  """The number of new tokens, by whichever name; where a task and a command differ, it is said."""
  given = {name: whole(name, kwargs[name]) for name in _MOST_NEW if name in kwargs}
  name, value = next(iter(given.items()), ("", default))
  if len(set(given.values())) > 1:
    named = ", ".join(f"{n}={v}" for n, v in given.items())
    _log.warning("Of %s %s counts; change it by that name.", named, name)
  return value


def _number(kwargs: dict, name: str, default: float) -> float:
  value = kwargs.get(name, default)
  good = isinstance(value, numbers.Real) and not isinstance(value, bool)
  require(name, value, good, "a number")
  return float(value)
