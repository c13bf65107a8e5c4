"""Requests that are bad, too many, too large or given up: what they get, and what they leave."""

import functools
import http.client
import json
import re
import resource
import socket

import pytest
import server_fixtures
from server_fixtures import (
  complete,
  events,
  get,
  hang_up,
  post,
  stream,
  texts,
  until,
)

DEEP = functools.reduce(lambda inner, _: [inner], range(490), 1)
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return server_fixtures.text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(model):
  limits = {"context": 400, "max_tokens": 350, "body_bytes": 1 << 20, "queue": 256}
  with server_fixtures.serving(model, **limits) as running:
    yield running


BAD = [
  (b"{", "The body is not JSON"),
  (b"[" * 100_000, "too deep"),
  (b"[1]", "must be a JSON object"),
  (b'{"prompt": "a", "prompt": "b"}', "occurs twice"),
  (b'{"prompt": "a", "top_p": NaN}', "NaN is no JSON number"),
  (b'{"prompt": "\xff"}', "not JSON"),
  ({}, "prompt is missing"),
  ({"prompt": []}, "prompt is .*; it must be a text"),
  ({"prompt": [[]]}, "a text, token ids, or a list"),
  ({"prompt": [5, "a"]}, "a text, token ids, or a list"),
  ({"prompt": [[5, 0.5]]}, "no token id"),
  ({"prompt": [True]}, "no token id"),
  ({"prompt": [10**9]}, "outside the model's vocabulary"),
  ({"prompt": ""}, "has no tokens"),
  ({"prompt": "a", "n": 129}, "n is 129; it must be a whole number from 1 to 128"),
  ({"prompt": ["a"] * 65, "n": 2}, "65 prompts times n=2 are more than 128"),
  ({"prompt": "a", "n": True}, "n is True"),
  ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
  ({"prompt": "a", "max_tokens": 351}, r"at most 350 \(--max_tokens\)"),
  ({"prompt": [5] * 60, "max_tokens": 350}, "prompt of 60 tokens and max_tokens of 350 are more"),
  ({"prompt": [5] * 400}, "prompt has 400 tokens, which leaves no room in a context of 400"),
  ({"prompt": "a", "max_tokens": 3, "max_completion_tokens": 4}, "differ"),
  ({"prompt": "a", "temperature": -1}, "temperature is -1; it must be a number from 0 to 100"),
  ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
  ({"prompt": "a", "top_p": 0}, "top_p=0"),
  ({"prompt": "a", "seed": 0.5}, "seed is 0.5"),
  ({"prompt": "a", "stop": [""]}, "stop is"),
  ({"prompt": "a", "stop": ["a"] * 17}, "at most 16 strings"),
  ({"prompt": "a", "logprobs": 6}, "logprobs is 6; it must be a whole number from 0 to 5"),
  ({"prompt": "a", "logprobs": 1, "stream": True}, "logprobs is not supported with stream"),
  ({"prompt": "a", "stream": 1}, "stream is 1; it must be true or false"),
  ({"prompt": "a", "stream_options": {"include_usage": True}}, "goes with stream"),
  ({"prompt": "a", "best_of": 3}, "best_of is not supported"),
  ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
  ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty is not supported"),
  ({"prompt": "a", "temperatur": 1}, "no field 'temperatur'; do you mean temperature?"),
  ({"prompt": "a", "trace": True}, "shows no passes"),
  ({"prompt": "\ud800"}, "tokenizer fails|not valid Unicode"),
]
BAD_CHATS = [
  ({"messages": []}, "messages is .*list of messages"),
  ({"messages": ["hi"]}, "messages is .*list of messages"),
  ({"messages": [{"role": "user"}]}, "messages is no prompt"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
  ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools is not supported"),
  ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format is not"),
  ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs needs logprobs"),
  ({"messages": CHAT, "prompt": "a"}, "no field 'prompt'"),
]


def test_a_deep_value_is_answered_or_refused(running):
  """How deep Python goes differs between its versions."""
  body = {"messages": [CHAT[0] | {"more": DEEP}], "max_tokens": 1}
  status, _, answer = post(running, "/v1/chat/completions", body)
  if status != 200:
    assert status == 400 and re.search("too deep|recursion", answer["error"]["message"])


def test_bad_requests_are_named(running):
  for path, cases in (("completions", BAD), ("chat/completions", BAD_CHATS)):
    for body, message in cases:
      status, _, answer = post(running, f"/v1/{path}", body)
      assert status == 400, (body, answer)
      error = answer["error"]
      assert error["type"] == "invalid_request_error" and set(error) >= {"param", "code"}
      with pytest.raises(ValueError, match=message):
        raise ValueError(error["message"])
      assert "Traceback" not in error["message"]
  assert server_fixtures.idle(running)


def test_fields_that_ask_for_nothing_are_taken(running):
  same = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me"}
  same |= {"stop": [None], "suffix": None, "best_of": 1, "seed": -1, "max_tokens": 3}
  assert texts(complete(running, "hello", **same)) == texts(
    complete(running, "hello", max_tokens=3)
  )
  chat = {"messages": CHAT, "max_tokens": 3, "tools": [], "tool_choice": "none"}
  chat |= {"response_format": {"type": "text"}, "parallel_tool_calls": True}
  assert post(running, "/v1/chat/completions", chat)[0] == 200


def test_routes_methods_types_and_sizes(running):
  assert get(running, "/nothing")[0] == 404
  assert get(running, "/v1/completions")[0] == 405
  form = {"Content-Type": "application/x-www-form-urlencoded"}
  assert post(running, "/v1/completions", {"prompt": "a"}, form)[0] == 415
  large = json.dumps({"prompt": "a" * (1 << 20)}).encode()
  status, _, answer = post(running, "/v1/completions", large)
  assert status == 413 and "larger than 1048576 bytes" in answer["error"]["message"]
  # 100 MB that do not say how many they are; none is kept.
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
  chunks = (b"a" * 65536 for _ in range(1600))
  given = {"Content-Type": "application/json"}
  connection.request("POST", "/v1/completions", chunks, given, encode_chunked=True)
  response = connection.getresponse()
  assert response.status == 413 and b"larger" in response.read()
  connection.close()
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 30_000
  assert get(running, "/health")[0] == 200


def test_a_client_that_leaves_frees_its_slot(running):
  """Streams and plain requests alike; the other rows keep their text, and miss no step."""
  want = texts(complete(running, [7, 8], max_tokens=300))[0]
  steps, sent = [], []
  engine = running.scheduler._engine
  step = engine.step

  def noting(passes):
    rows = running.scheduler._rows
    steps.append(len(rows))
    sent.extend(row.sent for request, row in rows.items() if request.prompt == [7, 8])
    return step(passes)

  engine.step = noting
  try:
    stays = stream(running, [7, 8])
    left = stream(running, [9])[:2]
    plain = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    body = json.dumps({"prompt": [4], "temperature": 0, "max_tokens": 300})
    plain.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    until(lambda: running.scheduler.open_rows() == 3)
    hang_up(*left)
    hang_up(plain)
    until(lambda: running.scheduler.open_rows() == 1)
    steps.clear()
    rest = stays[2].decode() + stays[1].read().decode()
    hang_up(*stays[:2])
  finally:
    del engine.step
  # The step that was under way may have had all three.
  assert set(steps[1:]) == {1}
  assert len(sent) > 10 and all(a < b for a, b in zip(sent, sent[1:], strict=False))
  assert "".join(e["choices"][0]["text"] for e in events(rest)) == want
  until(lambda: server_fixtures.idle(running))


def test_too_many_are_sent_away_with_a_time(model):
  with server_fixtures.serving(model, slots=8, queue=2) as running:
    status, headers, answer = post(running, "/v1/completions", {"prompt": "a", "n": 11})
    assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
    assert answer["error"]["type"] == "rate_limit_error"
    held = [stream(running, [5], max_tokens=190) for _ in range(10)]
    found = post(running, "/v1/completions", {"prompt": "a"})[0]
    assert found in (200, 429)  # some may have ended by then
    for connection, response, _ in held:
      response.read()
      connection.close()
    until(lambda: server_fixtures.idle(running))
    assert post(running, "/v1/completions", {"prompt": "a", "n": 10})[0] == 200


def test_time_limits(model):
  limits = {"seconds": 0.15, "body_seconds": 0.3, "context": 3000, "max_tokens": 2900}
  with server_fixtures.serving(model, **limits) as running:
    body = {"prompt": [5], "max_tokens": 2900, "temperature": 0, "stop": ["no such text"]}
    status, _, answer = post(running, "/v1/completions", body)
    assert status == 504 and "more than 0.15 s" in answer["error"]["message"]
    _, _, out = post(running, "/v1/completions", body | {"stream": True})
    assert json.loads(out.strip().split("\n\n")[-1][6:])["error"]["code"] == "timeout"
    until(lambda: server_fixtures.idle(running))
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as slow:
      head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
      slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
      assert b" 408 " in slow.recv(1000)


def test_a_key_is_asked_for(model, caplog):
  caplog.set_level("INFO")
  with server_fixtures.serving(model, api_key="right-key", wait=False) as running:
    until(lambda: running.server.started)
    assert get(running, "/health")[0] in (200, 503)
    assert get(running, "/")[0] == 200
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right-key"}):
      for path in ("/v1/models", "/metrics", "/v1/\x1b[31m%0a"):
        path = path.replace("\x1b", "%1b")
        status, headers, answer = get(running, path, given)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert answer["error"]["code"] == "invalid_api_key"
    assert get(running, "/v1/models", {"Authorization": "Bearer right-key"})[0] == 200
  assert r"'/v1/\x1b[31m\n'" in caplog.text
  assert "\x1b" not in caplog.text and "right-key" not in caplog.text


def test_a_page_from_elsewhere_cannot_ask_under_its_own_name(model):
  with server_fixtures.serving(model, local=True, wait=False) as running:
    until(lambda: running.server.started)
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", "localhost@evil"):
      assert get(running, "/v1/models", {"Host": host})[0] == 403
    for host in (f"127.0.0.1:{running.port}", "localhost", "LOCALHOST:1", "[::1]:80"):
      assert get(running, "/v1/models", {"Host": host})[0] == 200


def test_before_it_is_warm_it_says_so(model):
  with server_fixtures.serving(model, wait=False) as running:
    until(lambda: running.server.started)
    first = get(running, "/health"), post(running, "/v1/completions", {"prompt": "a"})
    until(lambda: running.scheduler.state == "ready", 100)
    assert get(running, "/health")[0] == 200
  assert first[0][0] == first[1][0] == 503 and first[1][1]["retry-after"]
