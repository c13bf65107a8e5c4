"""python -m refine_jax.serve as users start it, curl, and lm-eval's clients of such servers."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import sampler_fixtures
import server_fixtures
import torch

import refine_jax
from refine_jax.errors import UserError
from refine_jax.serving import command

EVALUATION = {"model": server_fixtures.NAME, "max_retries": 1, "num_concurrent": 4, "seed": 3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return sampler_fixtures.text_model_directory(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def started(directory, tmp_path, *options):
  """The program, and its base URL once it is ready."""
  log = tmp_path / "log"
  words = [f"--model={directory}", "--port=0", "--slots=8", "--context=220", "--trace_tokens=0"]
  with log.open("w") as file:
    program = subprocess.Popen(
      [sys.executable, "-m", "refine_jax.serve", *words, *options], stderr=file
    )
  try:
    server_fixtures.until(
      lambda: "Ready after" in log.read_text() or program.poll() is not None, 200
    )
    url = re.search(r" at (http://127\.0\.0\.1:\d+)/", log.read_text())
    assert url, log.read_text()
    yield types.SimpleNamespace(program=program, url=url[1], log=log)
  finally:
    program.kill()
    program.wait()


def curl(url, *options):
  """(body, status) of curl."""
  words = ["curl", "-sS", "-w", "\n%{http_code}", *options, url]
  out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
  body, _, status = out.rpartition("\n")
  return body, int(status)


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl_and_sigterm(directory, tmp_path):
  """Answers that are on their way end, new ones are refused, and the status is 0."""
  key = tmp_path / "key"
  key.write_text("secret\n")
  with started(directory, tmp_path, f"--api_key_file={key}", "--grace=60") as server:
    assert curl(f"{server.url}/health") == ('{"status":"ready"}', 200)
    assert curl(f"{server.url}/v1/models")[1] == 401
    asked = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 200}
    words = ("-N", "-H", "Authorization: Bearer secret", "-H", "Content-Type: application/json")
    words += ("-d", json.dumps(asked | {"stream": True}), f"{server.url}/v1/chat/completions")
    with subprocess.Popen(["curl", "-sS", *words], stdout=subprocess.PIPE, text=True) as stream:
      first = stream.stdout.readline()
      server.program.send_signal(signal.SIGTERM)
      rest = stream.stdout.read()
    assert server.program.wait(60) == 0
    found = server_fixtures.events(first + rest)
    text = "".join(c["delta"].get("content", "") for e in found for c in e["choices"])
    model = refine_jax.load(directory)
    want = refine_jax.generate(model, [asked["messages"]], slots=8, max_new_tokens=200)
    assert text == want.texts[0]
    assert found[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert "Traceback" not in server.log.read_text() and "secret" not in server.log.read_text()


def test_the_time_of_grace_ends(tmp_path):
  """What is not done by then gets an error."""
  model = server_fixtures.text_model(tmp_path)
  with server_fixtures.serving(model, grace=0.0, context=3000, max_tokens=2900) as running:
    connection, response, _ = server_fixtures.stream(running, [5], max_tokens=2900)
    running.server.should_exit = True
    last = response.read().decode().strip().split("\n\n")[-1]
    server_fixtures.hang_up(connection, response)
    assert json.loads(last.removeprefix("data: "))["error"]["message"].endswith("shutting down.")
    running.thread.join(30)
    assert not running.thread.is_alive() and running.scheduler.state == "shutting down"


def test_an_engine_that_fails_ends_the_server(directory, monkeypatch, caplog):
  model = refine_jax.load(directory)
  with server_fixtures.serving(model, slots=2) as running:

    def fail(passes):
      raise RuntimeError("out of order")

    monkeypatch.setattr(running.scheduler._engine, "step", fail)
    status, _, answer = server_fixtures.post(running, "/v1/completions", {"prompt": "a"})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    running.thread.join(30)
    assert not running.thread.is_alive()
  assert running.scheduler.state == "failed" and "out of order" in caplog.text


@pytest.mark.parametrize(
  "options, message",
  [
    (["--mode=fast"], "mode='fast'"),
    (["--slots=0"], "--slots='0' must be a whole number of at least 1"),
    (["--port=99999"], "--port=99999 must be at most 65535"),
    (["--host=192.0.2.1"], "Cannot listen at --host=192.0.2.1 --port=0: "),
    (["--host=no.such.host.invalid"], "Cannot listen at --host=no.such.host.invalid"),
    (["--api_key_file=/no/such"], r"/no/such \(--api_key_file\) cannot be read"),
    (["--dtype=int8"], "--dtype=int8 must be one of"),
    (["--chat_template=x"], "has a chat template"),
  ],
)
def test_what_cannot_be_is_said_in_a_line(directory, monkeypatch, capsys, options, message):
  monkeypatch.setattr(sys, "argv", ["serve", f"--model={directory}", "--port=0", *options])
  before = signal.getsignal(signal.SIGTERM)
  try:
    with pytest.raises((SystemExit, UserError)) as failure:
      command.main()
  finally:
    signal.signal(signal.SIGTERM, before)
  error = capsys.readouterr().err or str(failure.value)
  assert re.search(message, error) and "Traceback" not in error


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv(command.KEY_VARIABLE, "one")
  assert command.read_key(None) == "one"
  (tmp_path / "key").write_text(" two \n")
  assert command.read_key(str(tmp_path / "key")) == "two"
  (tmp_path / "key").write_text("\n")
  with pytest.raises(UserError, match="must hold one key"):
    command.read_key(str(tmp_path / "key"))


def test_slots_are_as_many_as_memory_has_room_for(directory, monkeypatch):
  from refine_jax.decoding import device_memory

  model = refine_jax.load(directory)
  arguments = command.parse(["--model=x", "--context=200"])
  monkeypatch.setattr(command, "_SLOTS", {"cpu": 64})
  assert command.make_engine(model, arguments, command.options_of(arguments)).slots == 64
  monkeypatch.setattr(device_memory, "free", lambda device: 2**22)
  assert command.make_engine(model, arguments, command.options_of(arguments)).slots in (4, 8, 16)
  arguments.slots = 64
  with pytest.raises(UserError, match="64 rows"):
    command.make_engine(model, arguments, command.options_of(arguments))


def instances(*arguments):
  return [types.SimpleNamespace(args=one) for one in arguments]


def test_lm_evals_clients(directory):
  """local-completions generates and scores, local-chat-completions generates."""
  from lm_eval.models import openai_completions as clients

  model = refine_jax.load(directory)
  tokenizer, kwargs = model.tokenizer, {"until": ["\n\n"], "max_gen_toks": 12}
  contexts = ["what is two", "hello world, the answer", "a b c"]
  with server_fixtures.serving(model) as running:
    local = clients.LocalCompletionsAPI(
      base_url=f"{running.url}/v1/completions",
      tokenizer=str(directory),
      tokenizer_backend="huggingface",
      max_length=180,
      **EVALUATION,
    )
    found = local.generate_until(instances(*((c, kwargs) for c in contexts)), disable_tqdm=True)
    ids = [tokenizer.encode(c, add_special_tokens=False) for c in contexts]
    want = refine_jax.generate(model, ids, slots=8, max_new_tokens=12, stop=["\n\n"])
    assert found == want.texts
    greedy = tokenizer.decode(want.tokens[2][:1])
    pairs = [("what is two", " and two"), ("hello", " world"), ("a b c", greedy)]
    scored = local.loglikelihood(instances(*pairs), disable_tqdm=True)
    for (context, answer), (value, is_greedy) in zip(pairs, scored, strict=True):
      start, more = (tokenizer.encode(t, add_special_tokens=False) for t in (context, answer))
      logits = torch.tensor(np.asarray(model(np.asarray([[*start, *more]])))[0]).double()
      table = torch.log_softmax(logits, -1)[len(start) - 1 : -1]
      assert value == pytest.approx(float(table[range(len(more)), more].sum()), abs=1e-3)
      assert is_greedy == (table.argmax(-1).tolist() == more)
    assert [greedy for _, greedy in scored] == [False, False, True]
    chat = clients.LocalChatCompletion(
      base_url=f"{running.url}/v1/chat/completions", tokenizer_backend=None, **EVALUATION
    )
    asked = [json.dumps([{"role": "user", "content": c}]) for c in contexts]
    from lm_eval.models.api_models import JsonChatStr

    arguments = ((JsonChatStr(a), {"max_gen_toks": 12}) for a in asked)
    found = chat.generate_until(instances(*arguments), disable_tqdm=True)
    want = refine_jax.generate(model, contexts, slots=8, max_new_tokens=12)
    assert found == want.texts
