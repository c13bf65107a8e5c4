"""The helper of the fuzzers itself: what it lets pass, and what not."""

import json

import pytest
from fuzzing import damaged_json, fuzz, taken_or_refused
from hypothesis import strategies as st

from refine_jax.errors import UserError

seen = {"cases": 0}


@fuzz(number=st.integers())
def test_a_fuzzer_gets_values_fixtures_and_many_cases(number, tmp_path):
  assert isinstance(number, int) and tmp_path.is_dir()
  seen["cases"] += 1


def test_a_fuzzer_ran_its_cases():
  assert seen["cases"] >= 100


def refuse(error):
  raise error


def test_a_refusal_of_one_line_passes_and_is_returned():
  assert taken_or_refused(lambda: 3) == 3
  assert str(taken_or_refused(refuse, UserError("a file lacks b"))) == "a file lacks b"


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError(), OSError("x" * 5000)])
def test_anything_else_fails(error):
  with pytest.raises((type(error), AssertionError)):
    taken_or_refused(refuse, error)


document = {"a": [1, {"b": "text"}], "c": {"d": None}}


@fuzz(content=damaged_json(document))
def test_damaged_documents_are_bytes_near_the_document(content):
  assert isinstance(content, bytes) and len(content) < 40_000


def test_damage_reaches_every_level():
  found = set()

  @fuzz(content=damaged_json(document))
  def collect(content):
    try:
      tree = json.loads(content)
    except ValueError:
      found.add("text")
      return
    found.update({"top"} if tree.keys() != document.keys() else {"inside"})

  collect(cases=100)
  assert found == {"text", "top", "inside"}
