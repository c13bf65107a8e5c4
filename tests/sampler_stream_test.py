"""Text that grows: what is given out is never taken back, and joined it is the whole text."""

import signal

import data_fixtures
import numpy as np
import pytest
import sampler_fixtures
import tokenizers
import transformers

import refine_jax
from refine_jax.decoding import generation
from refine_jax.decoding.runner import Runner
from refine_jax.decoding.unread import Unread
from refine_jax.text import detokenize
from refine_jax.text.detokenize import GrowingAnswer, GrowingText

WORDS = ["▁", "▁▁", "▁the", "s", "▁two", "<", "0", "\n", "é", "▁世"]


def byte_fallback():
  """A tokenizer like Llama 2's: bytes where a character has no token, no space at the start."""
  pieces = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True)
  )
  decoders = tokenizers.decoders
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
  )


def metaspace():
  """Drops the space of the first token that has text, and would clean up before punctuation."""
  pieces = ["<s>", "</s>", *WORDS, "▁.", "▁,", "n't", "▁n't"]
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<s>")
  )
  backend.decoder = tokenizers.decoders.Metaspace()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
  )


def words():
  """No decoder: a space between all tokens."""
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({p: i for i, p in enumerate(["<s>", "a", "bc"])}, unk_token="<s>")
  )
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TOKENIZERS = {
  "byte level": data_fixtures.make_tokenizer,
  "byte fallback": byte_fallback,
  "metaspace": metaspace,
  "words": words,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
  return TOKENIZERS[request.param]()


class Counting:
  """A tokenizer that counts the tokens it decodes."""

  def __init__(self, tokenizer):
    self._tokenizer, self.decoded = tokenizer, 0

  def __getattr__(self, name):
    return getattr(self._tokenizer, name)

  def decode(self, ids, **options):
    self.decoded += len(ids)
    return self._tokenizer.decode(ids, **options)


def random_ids(tokenizer, rng):
  """Runs of one kind: anything, characters of several tokens, tokens without text of their own."""
  silent = [i for i in range(len(tokenizer)) if not detokenize.decode(tokenizer, [i])]
  characters = tokenizer.encode("é世🙂", add_special_tokens=False)
  ids = []
  for _ in range(rng.integers(1, 8)):
    count = int(rng.integers(1, 25))
    ids += (
      rng.integers(0, len(tokenizer), count).tolist(),
      (characters * 8)[rng.integers(0, 4) :][:count],
      rng.choice([*silent, *characters], count).tolist(),
      rng.choice(silent, count).tolist(),
    )[rng.integers(0, 4)]
  return ids


def chunks(ids, rng):
  """Lists that joined are the ids; some are empty."""
  while ids:
    count = int(rng.integers(0, 6))
    yield ids[:count]
    ids = ids[count:]


@pytest.mark.parametrize("seed", range(60))
def test_text_that_was_given_out_stays_and_the_pieces_are_the_text(tokenizer, seed):
  rng = np.random.default_rng(seed)
  ids = random_ids(tokenizer, rng)
  want = detokenize.decode(tokenizer, ids)
  text = GrowingText(tokenizer)
  for chunk in chunks(ids, rng):
    before = text.settled
    text.add(chunk)
    assert text.settled.startswith(before) and want.startswith(text.settled)
  text.finish()
  assert text.settled == want


def test_spaces_stay_as_they_were_written():
  tokenizer = metaspace()
  assert detokenize.decode(tokenizer, tokenizer.convert_tokens_to_ids(["▁two", "▁."])) == "two ."


def test_only_the_end_is_decoded_again(tokenizer):
  rng = np.random.default_rng(0)
  counting = Counting(tokenizer)
  ids = tokenizer.encode("the two é世 bc a " * 200, add_special_tokens=False)
  text = GrowingText(counting)
  for chunk in chunks(ids, rng):
    text.add(chunk)
  assert counting.decoded < 25 * len(ids)


def test_whole_characters_do_not_wait():
  tokenizer = data_fixtures.make_tokenizer()
  ids = tokenizer.encode("the é世 🙂 two\n is  4", add_special_tokens=False)
  text = GrowingText(tokenizer)
  for count, token in enumerate(ids, 1):
    text.add([token])
    assert text.settled == tokenizer.decode(ids[:count]).rstrip("\ufffd")


def first_stop(tokenizer, ids, stops):
  """The fewest tokens that hold a stop string, and the text before it; on whole texts."""
  for count in range(len(ids) + 1):
    text = detokenize.decode(tokenizer, ids[:count])
    found = [text.index(stop) for stop in stops if stop in text]
    if found:
      return ids[:count], text[: min(found)]
  return ids, detokenize.decode(tokenizer, ids)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("stops", [(), ("e",), ("the t", "st"), ("世 🙂", "no"), ("dd", "d d")])
def test_an_answer_ends_before_the_first_stop_string(stops, seed):
  tokenizer = data_fixtures.make_tokenizer()
  rng = np.random.default_rng(seed)
  letters = tokenizer.encode("ddd dd the the t s st é世 🙂", add_special_tokens=False)
  ids = rng.choice(letters, 40).tolist() + letters
  want = first_stop(tokenizer, ids, stops)
  answer = GrowingAnswer(tokenizer, stops)
  parts = list(chunks(ids, rng))
  for number, part in enumerate(parts, 1):
    before = answer.text
    answer.extend(part, finished=number == len(parts))
    assert answer.text.startswith(before) and want[1].startswith(answer.text)
  assert (answer.tokens, answer.text) == want
  assert answer.stopped == any(s in detokenize.decode(tokenizer, ids) for s in stops)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return refine_jax.load(sampler_fixtures.text_model_directory(tmp_path_factory.mktemp("text")))


@pytest.mark.parametrize("passes", [1, 2, 5])
@pytest.mark.parametrize("stop", [(), ("e",), ("th", "a")])
def test_streams_of_samples_join_to_the_text(model, passes, stop):
  """Eight rows of random tokens, of which many are halves of characters."""
  options = {"max_new_tokens": 60, "temperature": 1.5, "seed": 3, "stop": stop}
  prompts = [[5 + i] for i in range(8)]
  whole = refine_jax.generate(model, prompts, **options)
  stream = refine_jax.generate(model, prompts, stream=passes, **options)
  assert ["".join(row) for row in zip(*stream, strict=True)] == whole.texts
  assert stream.result.tokens == whole.tokens and stream.result.texts == whole.texts
  for tokens, text in zip(whole.tokens, whole.texts, strict=True):
    assert (tokens, text) == first_stop(model.tokenizer, tokens, stop)
  if stop:
    assert sum(whole.stopped) > 4 and any(whole.texts)


def test_stream_gives_the_pieces_of_generate_with_stream(model):
  options = {"max_new_tokens": 12, "temperature": 1.5}
  pieces = list(refine_jax.stream(model, [[5], [6]], passes=2, **options))
  assert pieces == list(refine_jax.generate(model, [[5], [6]], stream=2, **options))
  assert len(pieces) > 1


@pytest.mark.parametrize("passes", [0, -1, 1.5, "2"])
def test_a_stream_of_no_passes_is_refused_by_name(model, passes):
  with pytest.raises(refine_jax.UserError, match="passes="):
    refine_jax.stream(model, [[5]], passes=passes)


def test_a_special_token_can_be_a_stop_string(model):
  """The row ends as with EOS, though the text lacks the token."""
  options = {"max_new_tokens": 200, "temperature": 3.0, "seed": 1, "eos_token_id": []}
  free = refine_jax.generate(model, [[5]], **options).tokens[0]
  special = detokenize.special_ids(model.tokenizer)
  text, token = next(pair for pair in special.items() if pair[1] in free)
  out = refine_jax.generate(model, [[5]], stop=[text, "nowhere"], **options)
  assert out.tokens[0] == free[: free.index(token) + 1]
  assert out.stopped == [True] and text not in out.texts[0]


@pytest.mark.parametrize(
  "of, when, stop",
  [
    *((Runner, name, stop) for name in ("enter", "start", "report") for stop in ((), ("e", "th"))),
    (Unread, "take", ()),  # rows that a string ends are not there
  ],
)
def test_an_interrupt_leaves_whole_answers_and_an_engine_that_goes_on(
  model, monkeypatch, of, when, stop
):
  """A notebook cell that is stopped at any moment of a step."""
  options = {"max_new_tokens": 60, "temperature": 1.5, "stop": stop, "draft": "tail"}
  prompts = [[5 + i] for i in range(5)]
  want = refine_jax.generate(model, prompts, **options)
  calls, make, real, count = [], generation.Call, getattr(of, when), 0

  def spy(*arguments, **more):
    calls.append(make(*arguments, **more))
    return calls[-1]

  def interrupted(*arguments):
    nonlocal count
    count += of is Runner or bool(arguments[0])  # there are answers to be made
    if count == 1:
      signal.raise_signal(signal.SIGINT)
    return real(*arguments)

  monkeypatch.setattr(generation, "Call", spy)
  monkeypatch.setattr(of, when, interrupted)
  with pytest.raises(KeyboardInterrupt):
    refine_jax.generate(model, prompts, slots=2, **options)
  so_far = calls[0].result()
  for tokens, text, whole in zip(so_far.tokens, so_far.texts, want.texts, strict=True):
    assert text == detokenize.decode(model.tokenizer, tokens) or text in whole
    assert not any(s in text for s in stop)
  assert any(so_far.tokens) and so_far.tokens != want.tokens
  while calls[0].busy:
    calls[0].step()
  assert calls[0].result().tokens == want.tokens and calls[0].result().texts == want.texts
