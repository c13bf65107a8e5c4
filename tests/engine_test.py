"""The engine itself: growth, slots that are freed, reasons, memory, what it refuses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import sampler_fixtures
import train_fixtures as tiny

import refine_jax
from refine_jax.decoding import device_memory, loading, pool
from refine_jax.decoding.call import Call
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import requests
from refine_jax.errors import UserError

EOS, DAMAGED = sampler_fixtures.EOS, 9
OPTIONS = Options(block_size=3, max_new_tokens=12, eos_token_id=())


@pytest.fixture(scope="module")
def model():
  config = tiny.tiny_config(layers=1, max_length=4096)
  return loading.Model(config, tiny.tiny_params(config), None, (EOS,), None, "tiny")


def submit(engine, prompts, options=OPTIONS, rows=None):
  wanted = requests(engine.model, prompts, options, rows=rows)
  for request in wanted:
    engine.submit(request)
  return wanted


def finish(engine):
  answers = {}
  while engine.busy:
    answers |= {answer.request: answer for answer in engine.step(2)}
  return answers


def iter_steps(engine):
  """The answers of steps as they come by default."""
  while engine.busy:
    yield from engine.step()


def alone(model, prompt, options=OPTIONS):
  given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
  return refine_jax.generate(model, [prompt], **given).tokens[0]


def test_caches_grow_while_rows_decode(model):
  """A row that is half done keeps its text, its noise and its samples."""
  engine = Engine(model, 2, options=OPTIONS)
  warm = dataclasses.replace(OPTIONS, temperature=1.0, max_new_tokens=300)
  (first,) = submit(engine, [[3, 4, 5]], warm)
  engine.step(3)
  before = engine.progress()[first]
  assert before.finish_reason is None and 0 < len(before.tokens) < 300
  long = np.random.default_rng(0).integers(0, 37, 900).tolist()
  (second,) = submit(engine, [long], rows=[7])
  answers = finish(engine)
  assert answers[first].tokens == alone(model, [3, 4, 5], warm)
  assert answers[second].tokens == alone(model, long)
  assert [answers[r].finish_reason for r in (first, second)] == ["length", "length"]


def test_a_cancelled_request_frees_its_slot_and_changes_no_other(model):
  engine = Engine(model, 2, options=OPTIONS)
  longer = dataclasses.replace(OPTIONS, max_new_tokens=200)
  wanted = submit(engine, [[3, 4], [5]], longer) + submit(engine, [[6, 7], [8]])
  engine.step(2)
  engine.cancel(wanted[0])  # decodes
  engine.cancel(wanted[3])  # waits
  answers = finish(engine)
  assert set(answers) == {wanted[1], wanted[2]}
  assert answers[wanted[1]].tokens == alone(model, [5], longer)
  assert answers[wanted[2]].tokens == alone(model, [6, 7])


def test_answers_are_made_while_the_next_step_runs(model):
  """One comes with the step after its last, and is seen before; at once where none follows."""
  engine = Engine(model, 2, options=OPTIONS)
  longer = dataclasses.replace(OPTIONS, max_new_tokens=200)  # more than the passes of a step say
  (short,), (long,) = submit(engine, [[3, 4]]), submit(engine, [[5]], longer)
  assert engine.step() == [] and engine.progress()[short].tokens == alone(model, [3, 4])
  assert [answer.request for answer in engine.step()] == [short]
  assert [answer.request for answer in iter_steps(engine)] == [long]
  (short,), (long,) = submit(engine, [[3, 4]]), submit(engine, [[5]], longer)
  assert engine.step() == []
  engine.cancel(short)
  assert [answer.request for answer in iter_steps(engine)] == [long]


def test_tokens_on_their_way_are_those_of_the_answer(model):
  """Of the requests that are asked for and decode, each token once."""
  engine = Engine(model, 2, options=OPTIONS)
  first, other, waits = submit(engine, [[3, 4], [5], [6]])
  seen, counts = [], []
  assert engine.new_tokens({first: 0}) == {}
  while engine.busy:
    answers = {answer.request: answer for answer in engine.step(1)}
    if first in answers:
      break
    found = engine.new_tokens({first: len(seen), waits: 0})
    assert set(found) == {first}
    tokens, passes = found[first]
    seen += tokens
    counts.append((len(seen), passes))
  assert seen == answers[first].tokens[: len(seen)] and len(seen) > 5
  assert counts == sorted(counts) and counts[-1][1] == len(counts)


def test_rows_that_say_nothing_end_with_a_reason_and_the_others_go_on(model):
  embedding = model.params["embedding"].at[DAMAGED].set(jnp.nan)
  damaged = dataclasses.replace(model, params=model.params | {"embedding": embedding})
  engine = Engine(damaged, 2, options=OPTIONS)
  wanted = submit(engine, [[5, 6], [5, DAMAGED, 7], [4], [DAMAGED]])
  answers = finish(engine)
  assert [answers[r].finish_reason == "not_finite" for r in wanted] == [False, True, False, True]
  for request in (wanted[1], wanted[3]):
    assert answers[request].tokens == [] and not answers[request].stopped
  assert answers[wanted[2]].tokens == alone(model, [4])


def test_a_warm_engine_compiles_nothing(model):
  engine = Engine(model, 5, options=dataclasses.replace(OPTIONS, block_size=2))
  spent = engine.warm_up(100)
  assert spent.programs == 3 and spent.compile_seconds > 0
  submit(engine, [[3, 4]] * 7, dataclasses.replace(OPTIONS, block_size=2))
  finish(engine)
  assert engine.costs.since(spent).programs == 0
  # A prompt of nearly all of the context has room for its last piece.
  engine.warm_up(390)
  spent = engine.costs
  submit(engine, [[3] * 389], dataclasses.replace(OPTIONS, block_size=2, max_new_tokens=1))
  finish(engine)
  assert engine.costs.since(spent).programs == 0
  assert engine.warm_up(390, traced=True).programs == 1


def test_reasons_of_an_end(model):
  (first, *_), options = alone(model, [3, 4]), dataclasses.replace(OPTIONS, eos_token_id=None)
  engine = Engine(model, 2, options=OPTIONS, eos_ids=9)
  ends = dataclasses.replace(options, eos_token_id=[*range(28, 36), first])
  wanted = submit(engine, [[3, 4]]) + submit(engine, [[3, 4]], ends)
  answers = finish(engine)
  assert [answers[r].finish_reason for r in wanted] == ["length", "eos"]
  assert answers[wanted[1]].tokens == [first]
  small = Engine(model, 2, options=OPTIONS)
  with pytest.raises(UserError, match="9 EOS ids, and the engine has room for 8; .*eos_ids=9"):
    submit(small, [[3, 4]], ends)


def test_what_an_engine_cannot_do_is_refused(model):
  engine = Engine(model, 2, 50, OPTIONS)
  with pytest.raises(UserError, match="mode, draft, block_size"):
    submit(engine, [[3]], dataclasses.replace(OPTIONS, block_size=4))
  with pytest.raises(UserError, match="60 tokens, which leaves no room in .* context of 50"):
    submit(engine, [[3] * 60])
  (request,) = submit(engine, [[3] * 45])
  assert len(finish(engine)[request].tokens) == 5
  assert not engine.busy


def test_memory_that_is_not_there_is_said_before_it_is_asked_for(monkeypatch, model):
  fresh = dataclasses.replace(model)
  engine = Engine(fresh, 64, options=OPTIONS)
  monkeypatch.setattr(device_memory, "free", lambda device: 2**20)
  with pytest.raises(UserError, match=r"64 rows of 512 tokens take .* GiB.* slots"):
    submit(engine, [[3]])
  assert not engine.busy
  # generate takes fewer slots, and drops what it kept.
  assert refine_jax.generate(fresh, [[3, 4], [5]], slots=0, max_new_tokens=3).tokens
  wanted = requests(fresh, [[3]] * 40, OPTIONS)
  assert pool.take(fresh, wanted).slots < 40
  with pytest.raises(UserError, match="GiB"):
    refine_jax.generate(fresh, [[3]] * 64, slots=64)


def test_a_model_keeps_few_engines(model):
  fresh = dataclasses.replace(model)
  for block in (2, 3, 4, 5, 6):
    refine_jax.generate(fresh, [[3]], block_size=block, max_new_tokens=2)
  assert [engine.settings.block for engine in fresh.idle_engines] == [3, 4, 5, 6]
  again = refine_jax.generate(fresh, [[7, 8]], block_size=6, max_new_tokens=2)
  assert again.programs == 0 and len(fresh.idle_engines) == 4


def test_the_numbers_of_a_call_stay_its_own(model):
  """Its engine serves the next call."""
  fresh = dataclasses.replace(model)
  call = Call(fresh, requests(fresh, [[3, 4]], OPTIONS))
  while call.busy:
    call.step()
  before = call.result()
  assert before.decode_seconds > 0
  refine_jax.generate(fresh, [[5, 6]], block_size=3, max_new_tokens=30, eos_token_id=())
  assert len(fresh.idle_engines) == 1 and call.result() == before


@pytest.mark.parametrize(
  "given, message",
  [
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"top_p": None}, "top_p=None"),
    ({"tau": True}, "tau=True"),
    ({"stop": 3}, "stop=3"),
    ({"stop": [3]}, r"stop=\[3\]"),
    ({"eos_token_id": 10**6}, "eos_token_id"),
  ],
)
def test_options_of_a_wrong_type_are_named(model, given, message):
  with pytest.raises(UserError, match=message):
    refine_jax.generate(model, [[3]], **given)


def test_a_nucleus_of_next_to_nothing_is_the_best_token(model):
  options = dataclasses.replace(OPTIONS, temperature=1.0, top_p=1e-300)
  assert alone(model, [3, 4], options) == alone(model, [3, 4])
