"""Fuzzers: whatever the input, it is taken or refused in one line, and in time."""

import faulthandler
import functools
import inspect
import json
import time
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from refine_jax.errors import UserError

_SECONDS = 30  # for one case; most take milliseconds


def fuzz(**strategies):
  """Decorates a test that takes values of these strategies, besides fixtures and parameters.

  It is run with 100 cases, and with 2,000 where slow tests are. The cases are the same each time.
  """

  def decorate(test):
    def run(cases, **fixtures):
      @hypothesis.settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
      )
      @hypothesis.given(**strategies)
      def check(**values):
        test(**values, **fixtures)

      check()

    functools.update_wrapper(run, test)
    ours = inspect.Parameter("cases", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    theirs = inspect.signature(test).parameters.items()
    run.__signature__ = inspect.Signature([ours, *(p for n, p in theirs if n not in strategies)])
    return pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])(run)

  return decorate


def taken_or_refused(function: Callable, *args, refusals=(UserError,), **kwargs):
  """Calls the function; anything raised but a refusal fails the test, with its traceback.

  Args:
    refusals: what may be raised; its text has to be one line, short enough to be read.

  Returns:
    what the function returns, or the refusal.
  """
  faulthandler.dump_traceback_later(4 * _SECONDS, exit=True)  # where no exception would end it
  start = time.monotonic()
  try:
    result = function(*args, **kwargs)
  except refusals as error:
    assert "\n" not in str(error) and 0 < len(str(error)) < 4200, error
    result = error
  finally:
    faulthandler.cancel_dump_traceback_later()
  assert time.monotonic() - start < _SECONDS
  return result


# Values that JSON files hold, with those that break readers: large, not finite, lone surrogates.
scalars = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 300),
  st.sampled_from([2**31, -(2**63), 2**64, 10**30]),
  st.floats(),
  st.sampled_from(["", "a", "{{", "\x00", "\ud800", "x" * 5000]),
  st.text(max_size=8),
)
values = st.recursive(
  scalars,
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=6,
)


def damaged_json(document) -> st.SearchStrategy[bytes]:
  """A document's JSON with one to three places replaced, removed or doubled, or its bytes hurt."""

  @st.composite
  def changed(draw):
    tree = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
      _change(draw, tree)
    return json.dumps(tree).encode()

  return changed() | damaged_bytes(json.dumps(document).encode())


def damaged_bytes(content: bytes) -> st.SearchStrategy[bytes]:
  """Bytes cut short, with a few overwritten, or with some put in."""
  at = st.integers(0, len(content))
  some = st.binary(max_size=4)
  return st.one_of(
    at.map(lambda i: content[:i]),
    st.builds(lambda i, x: content[:i] + x + content[i + len(x) :], at, some),
    st.builds(lambda i, x: content[:i] + x + content[i:], at, some),
  )


def _change(draw, tree):
  """Replaces, removes or copies one entry; each level is as likely as all that are below it."""
  while True:
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
      return
    key = draw(st.sampled_from(keys))
    if not isinstance(tree[key], (dict, list)) or draw(st.booleans()):
      break
    tree = tree[key]
  kind = draw(st.sampled_from(["replace", "remove", "copy"]))
  if kind == "replace":
    tree[key] = draw(values)
  elif kind == "remove":
    tree.pop(key)
  elif isinstance(tree, dict):
    tree[f"{key}2"] = tree[key]
  else:
    tree.insert(key, tree[key])
