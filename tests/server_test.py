"""The server beside `generate`: the same texts, by every client and in every form."""

import asyncio
import concurrent.futures
import json

import numpy as np
import openai
import pytest
import server_fixtures
import torch
from server_fixtures import NAME, complete, events, generated, get, post, texts

from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import Answer, requests
from refine_jax.serving import choices
from refine_jax.serving.refusals import Refused

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 2?"}]
IDS = [[5, 6, 7], [9, 8], [11, 30, 4, 4, 5]]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
  model = server_fixtures.text_model(tmp_path_factory.mktemp("model"))
  with server_fixtures.serving(model, trace_tokens=64) as running:
    yield running


@pytest.fixture(scope="module")
def client(running):
  with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
    yield client


def test_models(client):
  assert [model.id for model in client.models.list()] == [NAME]
  assert client.models.retrieve(NAME).id == NAME
  with pytest.raises(openai.NotFoundError, match="no model of that name"):
    client.models.retrieve("other")
  with pytest.raises(openai.NotFoundError, match="'tiny'"):
    client.completions.create(model="other", prompt="a")


def test_completions_are_greedy_texts_of_generate(running, client):
  want = generated(running.model, IDS)
  out = client.completions.create(model=NAME, prompt=IDS, max_tokens=12, temperature=0, n=2)
  assert [choice.text for choice in out.choices] == [t for t in want.texts for _ in range(2)]
  assert [choice.index for choice in out.choices] == list(range(6))
  usage = out.usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (10, 2 * sum(map(len, want.tokens)))
  assert usage.tokens_per_pass == pytest.approx(want.tokens_per_pass, abs=1e-4)
  assert usage.passes == 2 * sum(want.passes)
  # Text is taken as it is, and one prompt needs no list.
  ids = running.model.tokenizer.encode("hello world", add_special_tokens=False)
  for prompt in ("hello world", ids):
    out = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0)
    assert out.choices[0].text == generated(running.model, [ids]).texts[0]


def test_chats_are_greedy_texts_of_generate(running, client):
  want = generated(running.model, [CHAT])
  parts = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, CHAT[1]]
  for messages, limit in ((CHAT, "max_tokens"), (parts, "max_completion_tokens")):
    arguments = {"model": NAME, "messages": messages, "temperature": 0, limit: 12}
    out = client.chat.completions.create(**arguments)
    assert out.choices[0].message.content == want.texts[0]
    assert out.choices[0].message.role == "assistant"
    assert out.choices[0].finish_reason == "length"
    assert out.usage.prompt_tokens == len(want.prompts[0])
  # Without a limit an answer may fill the context.
  out = client.chat.completions.create(model=NAME, messages=CHAT, temperature=0)
  assert out.usage.total_tokens == server_fixtures.CONTEXT or out.choices[0].finish_reason == "stop"


def test_streams_are_the_whole_texts_by_pieces(running, client):
  want = generated(running.model, [CHAT]).texts[0]
  options = {"model": NAME, "max_tokens": 12, "temperature": 0, "stream": True}
  chunks = list(
    client.chat.completions.create(
      messages=CHAT, n=2, stream_options={"include_usage": True}, **options
    )
  )
  for index in (0, 1):
    mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
    assert mine[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in mine) == want
    assert [one.finish_reason for one in mine if one.finish_reason] == ["length"]
    assert len(mine) > 3
  assert chunks[-1].usage.completion_tokens == 24 and chunks[-1].usage.passes > 0
  pieces = client.completions.create(prompt=IDS[0], echo=True, **options)
  whole = complete(running, IDS[0], echo=True)
  assert "".join(piece.choices[0].text for piece in pieces) == texts(whole)[0]


def test_the_async_client(running):
  want = generated(running.model, IDS).texts

  async def ask(client, ids, stream):
    arguments = {"model": NAME, "prompt": ids, "max_tokens": 12, "temperature": 0}
    out = await client.completions.create(stream=stream, **arguments)
    if not stream:
      return out.choices[0].text
    return "".join([piece.choices[0].text async for piece in out])

  async def all_of_them():
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
      asked = [ask(client, ids, stream) for ids in IDS for stream in (False, True)]
      return await asyncio.gather(*asked)

  assert asyncio.run(all_of_them()) == [text for text in want for _ in range(2)]


def test_a_seed_gives_one_sample_alone_and_among_31_others(running):
  fields = {"temperature": 1.0, "seed": 7, "n": 2}
  alone = texts(complete(running, IDS[0], **fields))
  want = generated(running.model, [IDS[0]] * 2, temperature=1.0, seed=7).texts
  assert alone == want and alone[0] != alone[1]
  with concurrent.futures.ThreadPoolExecutor(32) as pool:
    others = [
      pool.submit(complete, running, IDS[i % 3], temperature=1.0, seed=100 + i, stream=False)
      for i in range(31)
    ]
    body = {"prompt": IDS[0], "max_tokens": 12, "stream": True, **fields}
    mine = pool.submit(post, running, "/v1/completions", body)
    crowd = {texts(other.result())[0] for other in others}
  pieces = ["", ""]
  for event in events(mine.result()[2]):
    for choice in event["choices"]:
      pieces[choice["index"]] += choice["text"]
  assert pieces == alone and len(crowd) > 20
  # Without a seed each answer has one of its own.
  two = [texts(complete(running, IDS[0], temperature=1.0))[0] for _ in range(2)]
  assert two[0] != two[1]


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(running, stream, trace):
  whole = texts(complete(running, IDS[2], max_tokens=40))[0]
  stop = whole[5:7]
  fields = {"prompt": IDS[2], "temperature": 0, "max_tokens": 40, "stop": [stop], "stream": stream}
  _, _, out = post(running, "/v1/completions", fields | {"trace": trace})
  found = events(out) if stream else [out]
  choices = [c for e in found for c in e["choices"]]
  assert "".join(c["text"] for c in choices) == whole[: whole.index(stop)]
  assert choices[-1]["finish_reason"] == "stop"
  if trace:
    assert found[-1]["refine_jax"]["trace_html"].count("<tr><th>") > 5
  if not stream:
    want = generated(running.model, [IDS[2]], stop=[stop])
    assert out["usage"]["completion_tokens"] == len(want.tokens[0])
  server_fixtures.until(lambda: server_fixtures.idle(running))


def log_probabilities(model, ids):
  logits = torch.tensor(np.asarray(model(np.asarray([ids])))[0])
  return torch.log_softmax(logits.double(), -1).numpy()


def test_logprobs_are_those_of_the_model(running):
  out = complete(running, IDS[2], logprobs=2, echo=True, max_tokens=3)
  tokens = generated(running.model, [IDS[2]]).tokens[0][:3]
  ids = [*IDS[2], *tokens]
  table = log_probabilities(running.model, ids)
  found = out["choices"][0]["logprobs"]
  want = table[range(len(ids) - 1), ids[1:]]
  assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
  np.testing.assert_allclose(found["token_logprobs"][1:], want, atol=1e-4)
  best = [max(top.values()) for top in found["top_logprobs"][1:]]
  np.testing.assert_allclose(best, table.max(-1)[:-1], atol=1e-4)
  # The generated ones are the likeliest, to the last bit: so lm-eval tells greedy ones.
  assert best[-3:] == found["token_logprobs"][-3:]
  # A prompt alone.
  alone = complete(running, IDS[2], logprobs=0, echo=True, max_tokens=0)
  np.testing.assert_allclose(alone["choices"][0]["logprobs"]["token_logprobs"][1:], want[:4], 1e-4)
  assert alone["usage"]["completion_tokens"] == 0


def test_logprobs_of_a_chat(client, running):
  out = client.chat.completions.create(
    model=NAME, messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
  )
  want = generated(running.model, [CHAT])
  ids, start = [*want.prompts[0], *want.tokens[0][:4]], len(want.prompts[0])
  table = log_probabilities(running.model, ids)
  content = out.choices[0].logprobs.content
  for place, entry in enumerate(content):
    top = np.sort(table[start - 1 + place])[::-1][:3]
    assert entry.logprob == pytest.approx(top[0], abs=1e-4)
    np.testing.assert_allclose([one.logprob for one in entry.top_logprobs], top, atol=1e-4)
  assert len(content) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_passes_are_shown(running, stream):
  body = {"messages": CHAT, "max_tokens": 12, "temperature": 0, "trace": True, "stream": stream}
  _, _, out = post(running, "/v1/chat/completions", body)
  found = events(out)[-1] if stream else out
  page = found["refine_jax"]["trace_html"]
  want = generated(running.model, [CHAT], trace=True)
  assert page.count("<tr><th>") == len(want.trace.rows[0]) + 1
  assert "answer 1: 12 tokens" in page and "<script" not in page


def test_an_answer_that_is_not_finite_is_an_error(running):
  (request,) = requests(running.model, [IDS[0]], Options())
  answer = Answer(request, [5], "a", "not_finite", 1, [])
  with pytest.raises(Refused, match="not finite") as error:
    choices.ended([answer])
  assert error.value.status == 500


def test_health_and_metrics(running):
  assert get(running, "/health")[2] == {"status": "ready"}
  before = numbers(running)
  complete(running, IDS[0], max_tokens=5)
  after = numbers(running)
  assert after["refine_jax_tokens_total"] - before["refine_jax_tokens_total"] == 5
  assert after["refine_jax_prompt_tokens_total"] - before["refine_jax_prompt_tokens_total"] == 3
  assert after["refine_jax_slots"] == 8 and after["refine_jax_open_rows"] == 0


def numbers(running):
  lines = [line for line in get(running, "/metrics")[2].splitlines() if line[:1] != "#"]
  return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_requests_are_json_in_ascii(running):
  """A field that is no Unicode is refused, and its answer is JSON all the same."""
  body = json.dumps({"prompt": "a", "\ud800": 1}).encode()
  status, _, answer = post(running, "/v1/completions", body)
  assert status == 400 and "no field" in answer["error"]["message"]
