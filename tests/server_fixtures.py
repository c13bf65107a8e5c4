"""A server in a thread of the test's process, and what its tests ask of it."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
import types

import sampler_fixtures

import refine_jax
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.serving import command
from refine_jax.serving.served import Limits, Served
from refine_jax.serving.server import Server
from refine_jax.text.tokenizer import prefix_ids

NAME, SLOTS, CONTEXT = "tiny", 8, 200


def text_model(place):
  """A tiny random model with a tokenizer, in float32, and positions for long answers."""
  model = refine_jax.load(sampler_fixtures.text_model_directory(place))
  return dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=4096))


@contextlib.contextmanager
def serving(model, *, slots=SLOTS, api_key="", local=False, wait=True, **limits):
  """Runs a server; gives its address, port, scheduler, model and thread."""
  limits = {"context": CONTEXT, "max_tokens": CONTEXT, "trace_tokens": 0} | limits
  options = Options(chat_template="", draft="tail")
  served = Served(
    name=NAME,
    model=model,
    options=options,
    limits=Limits(**limits),
    prefix=prefix_ids(model.require_tokenizer()),
    created=1,
    api_key=api_key,
    local=local,
  )
  place = command.bind("127.0.0.1", 0)
  server = Server(served, Engine(model, slots, limits["context"], options))
  thread = threading.Thread(target=server.run, args=([place],))
  port = place.getsockname()[1]
  running = types.SimpleNamespace(
    port=port, url=f"http://127.0.0.1:{port}", server=server, model=model, thread=thread
  )
  running.scheduler = server.scheduler
  thread.start()
  try:
    if wait:
      until(lambda: server.scheduler.state != "warming up", 300)
      assert server.scheduler.state == "ready", server.scheduler.error
      until(lambda: server.started, 10)
    yield running
  finally:
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def until(true, seconds=20):
  """Waits until something is true."""
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "it did not come true"
    time.sleep(0.005)


def idle(running):
  """Whether nothing is left of any request, in the event loop, the thread and the engine."""
  scheduler = running.scheduler
  return not (scheduler.open_rows() or scheduler._rows or scheduler._engine.busy)


def post(running, path, body, headers=(), method="POST"):
  """(status, headers, parsed JSON or text) of a request."""
  connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)
  try:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | dict(headers)
    connection.request(method, path, raw, given)
    response = connection.getresponse()
    text = response.read().decode()
  finally:
    connection.close()
  kind = response.headers.get("content-type", "")
  return response.status, response.headers, json.loads(text) if "json" in kind else text


def get(running, path, headers=()):
  return post(running, path, b"", headers, "GET")


def complete(running, prompt, **fields):
  """The answer to /v1/completions, greedy unless said otherwise."""
  body = {"prompt": prompt, "temperature": 0, "max_tokens": 12} | fields
  status, _, answer = post(running, "/v1/completions", body)
  assert status == 200, answer
  return answer


def texts(answer):
  return [choice["text"] for choice in answer["choices"]]


def events(text):
  """The values of server-sent events, without the last one."""
  lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
  assert lines[-1] == "[DONE]"
  return [json.loads(line) for line in lines[:-1]]


def stream(running, prompt, **fields):
  """A connection whose response is a stream; its first piece is there."""
  connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
  body = {"prompt": prompt, "temperature": 0, "stream": True, "max_tokens": 300} | fields
  given = {"Content-Type": "application/json"}
  connection.request("POST", "/v1/completions", json.dumps(body), given)
  response = connection.getresponse()
  assert response.status == 200
  return connection, response, response.readline()


def hang_up(connection, response=None):
  if response is not None:
    response.close()  # it has the socket too
  connection.close()


def generated(model, prompts, **options):
  """The oracle: what generate says, with programs that the server has too."""
  options = {"draft": "tail", "slots": SLOTS, "max_new_tokens": 12} | options
  return refine_jax.generate(model, prompts, **options)
