"""Bodies of requests of any kind: read as requests of the engine, or refused with a 4xx in JSON."""

import json

import pytest
import sampler_fixtures
from fuzzing import damaged_json, fuzz, taken_or_refused
from hypothesis import strategies as st

import refine_jax
from refine_jax.decoding.options import Options
from refine_jax.serving import protocol, replies
from refine_jax.serving.refusals import Refused
from refine_jax.serving.served import Limits, Served

LIMITS = Limits(context=100, max_tokens=50)
FIELDS = {
  "model": "tiny",
  "max_tokens": 5,
  "temperature": 0.5,
  "top_p": 0.9,
  "top_k": 3,
  "seed": 1,
  "n": 2,
  "stop": ["a", "<|end|>"],
  "stream": True,
  "stream_options": {"include_usage": True},
  "presence_penalty": 0,
  "user": "me",
}
COMPLETION = FIELDS | {"prompt": ["hello", [5, 6]], "echo": True, "best_of": 2}
CHAT = FIELDS | {
  "messages": [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "yes", "tool_calls": None},
    {"role": "user", "content": "go on"},
  ],
  "tools": [],
  "tool_choice": "auto",
  "response_format": {"type": "text"},
}
SCORED = {"prompt": [5, 6, 7], "max_tokens": 0, "echo": True, "logprobs": 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  directory = sampler_fixtures.text_model_directory(tmp_path_factory.mktemp("model"))
  more = {"options": Options(), "limits": LIMITS, "prefix": [], "created": 1}
  return Served(name="tiny", model=refine_jax.load(directory), **more)


def bodies():
  whole = (("completion", COMPLETION), ("chat", CHAT), ("completion", SCORED))
  return st.one_of([damaged_json(body).map(lambda x, kind=kind: (kind, x)) for kind, body in whole])


@pytest.mark.parametrize("kind, body", [("completion", COMPLETION), ("chat", CHAT)])
def test_what_is_damaged_is_right_before(served, kind, body):
  asked = protocol.read(kind, served, json.dumps(body).encode())
  assert asked.stream and asked.n == 2 and len(asked.requests) == 2 * len(asked.prompts)


@fuzz(given=bodies())
def test_any_body_is_read_or_refused(given, served):
  kind, body = given
  asked = taken_or_refused(protocol.read, kind, served, body, refusals=(Refused,))
  if isinstance(asked, Refused):
    assert 400 <= asked.status < 500 and replies.encoded(asked.body).isascii()
  else:
    assert 0 < len(asked.requests) <= LIMITS.rows
    for request in asked.requests:
      most = request.options.max_new_tokens if asked.generates else 0
      assert len(request.prompt) + most <= LIMITS.context
