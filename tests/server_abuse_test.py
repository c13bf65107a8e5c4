"""Many clients, some of which hang up or read slowly: no answer is lost, and nothing stays."""

import concurrent.futures
import gc
import http.client
import json
import os
import random
import resource
import threading
import time

import pytest
import server_fixtures
from server_fixtures import NAME, complete, events, hang_up, post, stream, texts, until


@pytest.fixture(scope="module")
def running(tmp_path_factory):
  model = server_fixtures.text_model(tmp_path_factory.mktemp("model"))
  with server_fixtures.serving(model) as running:
    yield running


def crowd(running, streams, seed=0):
  """Streams of mixed length at a time, a third of which hang up: texts of those that stay."""
  rng = random.Random(seed)
  lengths = [rng.randint(5, 50) for _ in range(streams)]

  def one(i):
    connection, response, first = stream(running, [5 + i], max_tokens=lengths[i])
    if i % 3 == 0:
      hang_up(connection, response)
      return None
    if i % 8 == 1:
      time.sleep(0.2)  # a slow reader
    text = first.decode() + response.read().decode()
    hang_up(connection, response)
    return "".join(e["choices"][0]["text"] for e in events(text))

  with concurrent.futures.ThreadPoolExecutor(streams) as pool:
    return lengths, list(pool.map(one, range(streams)))


def test_streams_whose_neighbours_hang_up(running):
  lengths, found = crowd(running, 64)
  until(lambda: server_fixtures.idle(running))
  kept = [i for i in range(64) if i % 3]
  prompts = [[5 + i] for i in kept]
  body = {"prompt": prompts, "temperature": 0, "max_tokens": max(lengths)}
  _, _, whole = post(running, "/v1/completions", body)
  for i, text in zip(kept, texts(whole), strict=True):
    # The last character may have been half there.
    assert found[i] and text.startswith(found[i].rstrip("\ufffd")), i
  assert [found[i] is None for i in range(64)] == [i % 3 == 0 for i in range(64)]


def descriptors():
  gc.collect()
  return len(os.listdir("/proc/self/fd"))


def storm(running, count, body, want, threads=16):
  """Sends requests over kept connections; counts the statuses."""
  found, lock = {}, threading.Lock()

  def worker(share):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)
    for _ in range(share):
      connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
      response = connection.getresponse()
      text = response.read()
      with lock:
        found[response.status] = found.get(response.status, 0) + 1
      assert want is None or json.loads(text)["choices"][0]["text"] == want
    connection.close()

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(worker, [count // threads] * threads))
  return found


def abuse(running, short, bad):
  body = json.dumps({"model": NAME, "prompt": [5, 6], "max_tokens": 2, "temperature": 0}).encode()
  want = texts(complete(running, [5, 6], max_tokens=2))[0]
  storm(running, 64, body, want)
  before, memory = descriptors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert storm(running, short, body, want) == {200: short}
  assert storm(running, bad, b'{"prompt": 1', None) == {400: bad}
  until(lambda: server_fixtures.idle(running))
  # Threads of the parsers may have come to be; connections have to be gone.
  until(lambda: descriptors() <= before + 8)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
  assert grown < 100_000, f"{grown} KiB"


def test_many_short_and_many_bad_requests(running):
  abuse(running, 320, 160)


@pytest.mark.slow
def test_ten_thousand_short_and_a_thousand_bad_requests(running):
  abuse(running, 10_000, 1_008)
  for seed in range(20):
    crowd(running, 64, seed)
  until(lambda: server_fixtures.idle(running))
