"""PEFT as the oracle of our adapters, and PyTorch alone decoding with what we export."""

import functools

import hf_fixtures
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
import uno_decode
from adapter_fixtures import AdapterRun
from sampler_fixtures import EOS, entered, greedy, unequal_prompts

import refine_jax
from refine_jax.attention import packed
from refine_jax.batch import Batch
from refine_jax.decoding.settings import Settings
from refine_jax.hf.export_adapter import export_adapter
from refine_jax.model import adapters, transformer

NOISE, BLOCK, NEW = 7, 4, 16


# Names that transformers is to drop: PEFT uses the one, and its earlier releases want the other.
pytestmark = [
  pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
  pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  @functools.cache
  def make(family):
    """A gated export of a random adapter, and the base with it in PyTorch."""
    place = tmp_path_factory.mktemp(family)
    run = AdapterRun(place, "gated", family)
    output = export_adapter(
      run.adapter,
      run.workdir / "model",
      place / "out",
      base=str(run.base),
      how="copy",
      fingerprint=run.identity["base"],
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    return output, run, theirs

  return make


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_peft_computes_what_noise_tokens_do_here(exported, family):
  output, run, theirs = exported(family)
  model = refine_jax.load(output)
  ids = hf_fixtures.random_ids((2, 11))
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids).long()).logits.numpy()
  factors = adapters.working_copy(model.adapter.factors, model.adapter.shape, jnp.float32)
  params = adapters.attach(model.params, factors, model.config)
  segments = np.ones_like(ids)
  batch = Batch(
    ids, packed.segment_positions(segments), segments, is_noise=np.ones(ids.shape, bool)
  )
  x = transformer.hidden_states(params, model.config, batch, packed.for_batch(batch))
  np.testing.assert_allclose(transformer.logits(params, x), want, atol=1e-4)
  assert np.abs(want - hf_fixtures.torch_logits(run.torch_model, ids)).max() > 0.1


@pytest.mark.parametrize(("family", "noise"), [("llama", NOISE), ("qwen3", None)])
def test_two_passes_in_torch_alone_give_the_text_of_the_base(exported, family, noise):
  _, run, theirs = exported(family)
  for prompt in unequal_prompts(3, 61)[:2]:
    answer, counts = uno_decode.decode(
      theirs, prompt, vocab_size=61, block=BLOCK, new=NEW, eos=EOS, noise_token=noise
    )
    assert answer == greedy(run.torch_model, prompt, NEW)
    assert min(counts) >= 2 and sum(counts) >= len(answer)  # a seed's own token is always right


def test_drafts_after_a_prompt_are_those_of_two_passes(exported):
  output, _, theirs = exported("llama")
  model = refine_jax.load(output)
  prompts = unequal_prompts(3, 61)
  settings = Settings(block=BLOCK + 1, draft="branches")
  assert settings.drafts_of_prompt == BLOCK
  arguments = (model.decoding_params(1), model.config, settings, prompts)
  tokens = np.asarray(entered(*arguments, size=64, new=NEW, noise=NOISE).tokens)
  for row, prompt in enumerate(prompts):
    drafts = tokens[row, len(prompt) : len(prompt) + BLOCK].tolist()
    assert drafts == uno_decode.drafts(theirs, prompt, [NOISE] * (BLOCK - 1))
