"""The PyTorch code of an export: transformers' own generate is the oracle of its text."""

import functools

import custom_generate_fixtures
import hf_fixtures
import peft
import pytest
import torch
import transformers
import uno_decode
from adapter_fixtures import write_adapter
from custom_generate_fixtures import (
  BLOCK,
  CASES,
  EOS,
  NOISE,
  complete,
  inputs,
  new_tokens,
  ours,
  until_eos,
)
from sampler_fixtures import unequal_prompts

import refine_jax

# Names that transformers is to drop, which PEFT uses.
pytestmark = [
  pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
  pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory):
  yield from custom_generate_fixtures.alone(tmp_path_factory)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  place = tmp_path_factory.mktemp("models")
  return functools.cache(lambda case: custom_generate_fixtures.make(place / case, case))


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_that_of_transformers_whatever_the_block(exported, case):
  directory, model = exported(case)
  arguments = inputs(unequal_prompts(4, 61))
  want = model.generate(**arguments)
  for block in (None, 1, 7):
    assert torch.equal(ours(model, directory, arguments, block_size=block), want), block


def test_the_cases_hold_every_family():
  assert {family for family, _ in CASES.values()} == set(hf_fixtures.FAMILIES)


def test_a_call_after_another_meets_nothing_of_it(exported):
  directory, model = exported("llama")
  for seed, new in ((0, 9), (1, 40), (2, 9)):  # room for more tokens is made for the second
    arguments = inputs(unequal_prompts(3, 61, seed), max_new_tokens=new)
    assert torch.equal(ours(model, directory, arguments), model.generate(**arguments))


def test_models_loaded_with_remote_code_decode_so_by_themselves(exported):
  directory, model = exported("llama")
  loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
  arguments = inputs(unequal_prompts(2, 61)) | {"return_dict_in_generate": True}
  out = loaded.generate(**arguments)
  assert torch.equal(out.sequences, model.generate(**arguments).sequences)
  assert out["passes"].shape == (2,) and "passes" not in model.generate(**arguments)


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
  """A base of ten tokens, among which drafts are right at times, with an adapter beside it."""
  place = tmp_path_factory.mktemp("gated")
  directory, _ = hf_fixtures.tiny_hf_model("qwen3", place, vocab_size=10, seed=1)
  write_adapter(directory, directory / "adapter", kind="gated", alpha=2.0)
  return complete(directory, adapter="adapter")


def passes_with(theirs, prompt, answer):
  """How many passes an answer takes, by PEFT's drafts after each text that was verified."""
  noise, done, drafts, passes = [NOISE] * (BLOCK - 1), 0, [], 0
  while done < len(answer):
    wrong = [a != b for a, b in zip(drafts, answer[done:], strict=False)]
    right = (*wrong, True).index(True)
    drafts = uno_decode.drafts(theirs, prompt + answer[: done + right], noise)[1:]
    done, passes = done + right + 1, passes + 1
  return passes


def test_an_adapter_drafts_and_leaves_the_text_and_the_model_as_they_are(gated):
  directory, model = gated
  prompts = unequal_prompts(6, 10)
  arguments = inputs(prompts, max_new_tokens=24, return_dict_in_generate=True, eos_token_id=EOS[0])
  want = model.generate(**arguments).sequences
  out = ours(model, directory, arguments)
  assert torch.equal(out.sequences, want)
  assert not any(m._forward_hooks for m in model.modules())
  base = transformers.AutoModelForCausalLM.from_pretrained(directory)
  theirs = peft.PeftModel.from_pretrained(base, directory / "adapter").eval()
  answers = [until_eos(row) for row in new_tokens(want, arguments)]
  counts = [passes_with(theirs, p, a) for p, a in zip(prompts, answers, strict=True)]
  assert out["passes"].tolist() == counts and 1.3 * sum(counts) < sum(map(len, answers))


# Others compare ours with transformers' generate, as the tests here do.
@pytest.mark.slow
@pytest.mark.parametrize("random", [False, True])
def test_ours_says_the_same_with_the_same_adapter(gated, random):
  directory, model = gated
  model.generation_config.refinement["random_noise"] = random
  prompts = unequal_prompts(3, 10)
  arguments = inputs(prompts, max_new_tokens=12, eos_token_id=EOS[0])
  answers = [until_eos(r) for r in new_tokens(ours(model, directory, arguments), arguments)]
  out = refine_jax.generate(refine_jax.load(directory), prompts, max_new_tokens=12)
  assert out.tokens == answers


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["qwen3", "gemma3"])
def test_on_a_gpu_a_recorded_pass_says_the_same(exported, case):
  directory, _ = exported(case)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory).to("cuda")
  calls = []
  for seed, new in ((0, 20), (1, 20), (2, 1100)):  # recorded, replayed, recorded for more room
    call = inputs(unequal_prompts(3, 61, seed), max_new_tokens=new, eos_token_id=None)
    calls.append(call | {x: call[x].to("cuda") for x in ("input_ids", "attention_mask")})
  want = [ours(model, directory, call, cuda_graph=False) for call in calls]
  for call, text in zip(calls, want, strict=True):
    assert torch.equal(ours(model, directory, call), text)
  for call, text in zip(calls[:2], want, strict=False):  # long answers meet near ties
    assert torch.equal(model.generate(**call), text)
