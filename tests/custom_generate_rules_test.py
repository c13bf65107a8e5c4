"""The PyTorch code of an export does what a call of generate asks for, or says that it does not."""

import sys

import custom_generate_fixtures
import pytest
import sampler_fixtures
import torch
import transformers
from custom_generate_fixtures import EOS, NOISE, PAD, inputs, new_tokens, ours, until_eos
from sampler_fixtures import unequal_prompts
from transformers.generation import StoppingCriteriaList


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory):
  yield from custom_generate_fixtures.alone(tmp_path_factory)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  return custom_generate_fixtures.make(tmp_path_factory.mktemp("models"), "llama")


def test_a_sample_is_that_of_one_token_at_a_time(exported):
  directory, model = exported
  chosen = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20}
  arguments = inputs(unequal_prompts(3, 61), return_dict_in_generate=True) | chosen
  texts, passes = [], []
  for seed, block in ((3, 1), (3, 6), (4, 6)):
    torch.manual_seed(seed)
    out = ours(model, directory, arguments, block_size=block)
    texts.append(out.sequences.tolist())
    passes.append(int(out["passes"].sum()))
  assert texts[0] == texts[1] != texts[2] and passes[1] < passes[0]


def test_samples_have_the_models_distribution(exported):
  directory, model = exported
  rows, prompt = 800, [9, 4, 30]
  chosen = {"do_sample": True, "temperature": 0.7, "top_k": 3, "top_p": 1.0, "max_new_tokens": 2}
  arguments = inputs([prompt] * rows) | chosen
  torch.manual_seed(0)
  found = ours(model, directory, arguments, block_size=3)[:, 3:].tolist()

  def law(ids):  # the three most likely tokens
    with torch.no_grad():
      scores, tokens = (model(torch.tensor([ids])).logits[0, -1] / 0.7).topk(3)
    return list(zip(tokens.tolist(), scores.softmax(-1).tolist(), strict=True))

  after = {a: [(PAD, 1.0)] if a in EOS else law([*prompt, a]) for a, _ in law(prompt)}
  want = {(a, b): rows * p * q for a, p in law(prompt) for b, q in after[a]}
  counts = {pair: sum(row == list(pair) for row in found) for pair in want}
  assert sum(counts.values()) == rows and len(want) >= 7
  # Chi-square with at most 8 degrees of freedom: 26.1 has a chance of 0.001.
  assert sum((counts[pair] - n) ** 2 / n for pair, n in want.items()) < 26.1


class EndsAt:
  """A criterion of a user's: the sum of the last two tokens."""

  def __call__(self, input_ids, scores, **kwargs):
    return input_ids[:, -2:].sum(1) % 7 == 0


RULES = {
  "processors": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
  "criteria": {"stopping_criteria": StoppingCriteriaList([EndsAt()])},
  "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: range(3 + row, 40)},
  "length": {"max_new_tokens": None, "max_length": 15},
  "no end": {"eos_token_id": None},
}


@pytest.mark.parametrize("rules", RULES)
def test_every_rule_of_a_call_holds_token_by_token(exported, rules):
  directory, model = exported
  arguments = inputs(unequal_prompts(4, 61), max_new_tokens=30) | RULES[rules]
  want = model.generate(**arguments)
  assert torch.equal(ours(model, directory, arguments, block_size=3), want)
  plain = model.generate(**inputs(unequal_prompts(4, 61), max_new_tokens=30))
  assert not torch.equal(want, plain)


def test_stop_strings_end_a_row(tmp_path):
  directory = sampler_fixtures.text_model_directory(tmp_path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
  directory, model = custom_generate_fixtures.complete(directory)
  arguments = {**tokenizer(["What is", "Say it all"], padding=True, return_tensors="pt")}
  arguments.pop("token_type_ids", None)
  arguments |= {"do_sample": False, "max_new_tokens": 20}
  plain = model.generate(**arguments)
  said = map(tokenizer.decode, new_tokens(plain, arguments)[0])
  word = next(w for w in list(said)[5:] if w.isascii() and w.isalnum())
  arguments |= {"stop_strings": word, "tokenizer": tokenizer}
  want = model.generate(**arguments)
  assert torch.equal(ours(model, directory, arguments, block_size=5), want)
  assert not torch.equal(want, plain)


def test_a_streamer_gets_what_transformers_gives_it(exported):
  directory, model = exported
  arguments = inputs([[3, 30, 9]])

  class Kept(transformers.generation.BaseStreamer):
    def __init__(self):
      self.tokens, self.ended = [], False

    def put(self, value):
      self.tokens += value.flatten().tolist()

    def end(self):
      self.ended = True

  theirs, own = Kept(), Kept()
  model.generate(**arguments, streamer=theirs)
  ours(model, directory, arguments, streamer=own)
  assert own.tokens == theirs.tokens and own.ended


def test_what_it_does_not_do_is_an_error(exported):
  directory, model = exported
  arguments = inputs(unequal_prompts(2, 61))
  right = inputs([[5, 6, 2, 2], [5, 6, 7, 8]])
  right["attention_mask"][0, 2:] = 0
  for call, named in (
    (arguments | {"num_beams": 2}, "beam_search"),
    (arguments | {"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
    (arguments | {"guidance_scale": 1.5}, "ClassifierFreeGuidance"),
    (arguments | {"stop_strings": ["a"]}, "tokenizer=tokenizer"),
    (right, "padding_side='left'"),
  ):
    with pytest.raises(ValueError, match=named):
      ours(model, directory, call)
  other = transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation="flex_attention"
  )
  with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
    ours(other, directory, arguments)


def by_blocks(model, ids, new, size, passes):
  """The method as it was first described, for one prompt: dense logits, no cache."""
  text = list(ids)
  while len(text) < len(ids) + new and EOS[0] not in text[len(ids) :]:
    drafts = [NOISE] * size
    for _ in range(passes):
      with torch.no_grad():
        logits = model(torch.tensor([[*text, *drafts[:size]]])).logits[0]
      drafts = logits[len(text) - 1 :].argmax(-1).tolist()
      drafts = drafts[: size + 1]
    text += drafts
  return until_eos(text[len(ids) :][:new])


@pytest.mark.parametrize("passes", [1, 3])
def test_iterative_generate_is_the_first_description(exported, passes, monkeypatch):
  directory, model = exported
  monkeypatch.syspath_prepend(directory)
  monkeypatch.delitem(sys.modules, "custom_generate", raising=False)
  from custom_generate.generate import iterative_generate  # what a user of the original writes

  prompts = unequal_prompts(3, 61)
  arguments = inputs(prompts)
  out = iterative_generate(
    model=model,
    input_ids=arguments["input_ids"],
    attention_mask=arguments["attention_mask"],
    eos_token_id=EOS[0],
    pad_token_id=PAD,
    max_new_tokens=20,
    add_eos_length=5,
    refine_iter=passes,
  )
  want = [by_blocks(model, prompt, 20, 5, passes) for prompt in prompts]
  longest = max(map(len, want))
  assert new_tokens(out, arguments) == [row + [PAD] * (longest - len(row)) for row in want]
