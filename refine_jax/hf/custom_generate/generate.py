"""Decodes several tokens a forward pass: the text of greedy decoding, or a sample of the model.

    model = AutoModelForCausalLM.from_pretrained(DIR)
    model.generate(**inputs, custom_generate=DIR, trust_remote_code=True)

A pass runs over the last token, the drafts after it, and a run of noise tokens after each place
where the verified text may end (quadratic decoding, arXiv:2507.11851). Drafts that are what the
model itself chooses there are kept, and one token more: drafts change the speed and never the text.
In bfloat16 rounding may part it from one token at a time where two logits are nearly equal.

Needs torch and transformers (4.57 or 5) alone. generation_config.json says under "refinement" what
the model was trained with: noise_token, random_noise, block_size, adapter.
"""

import weakref
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, generation

from .passes import Layout, Passes

# Logits processors that look at scores alone. Others are called for one token after the other.
_OF_SCORES = {
  f"{name}LogitsWarper" for name in ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon")
}
_REFUSED = {"UnbatchedClassifierFreeGuidanceLogitsProcessor"}
_LAST = weakref.WeakKeyDictionary()  # model -> (key, Passes) of its last call


def generate(
  model: PreTrainedModel,
  inputs: torch.Tensor | None = None,
  *,
  export: str | None = None,
  block_size: int | None = None,
  noise_token: int | None = None,
  cuda_graph: bool = True,
  **kwargs: Any,
) -> torch.Tensor | generation.GenerateDecoderOnlyOutput:
  """Does what `model.generate` does with these arguments, greedily or sampling, in fewer passes.

  Args:
    export: a directory or hub name whose "refinement" and adapter go with a model that was loaded
      from elsewhere. Default: what the model was loaded from.
    block_size: most tokens that a pass may add. Default: that of the training.
    noise_token: default: that of the training, or the first EOS.
    cuda_graph: on a GPU, record a pass once and replay it.

  Returns:
    ids [rows, prompt + new]; with return_dict_in_generate=True also "passes", int64 [rows].
  """
  for name in ("custom_generate", "trust_remote_code"):  # after from_pretrained with the latter
    kwargs.pop(name, None)
  trained = _trained(model, export)
  # transformers keeps the tokenizer and the streamer from a callable.
  tokenizer, stops = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
  if stops is not None:
    if tokenizer is None:
      raise ValueError("stop_strings needs the tokenizer: generate(..., tokenizer=tokenizer).")
    criteria = [generation.StopStringCriteria(stop_strings=stops, tokenizer=tokenizer)]
    criteria += kwargs.get("stopping_criteria") or []
    kwargs["stopping_criteria"] = generation.StoppingCriteriaList(criteria)

  def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **rest):
    _refuse(generation_config, logits_processor, rest)
    ids, rows, device = input_ids.to(model.device), len(input_ids), model.device
    eos = [c.eos_token_id for c in stopping_criteria if isinstance(c, generation.EosTokenCriteria)]
    eos = torch.cat([torch.empty(0, dtype=torch.long), *(e.reshape(-1).cpu() for e in eos)])
    first = int(eos[0]) if len(eos) else 0
    noise = next(n for n in (noise_token, trained["noise_token"], first) if n is not None)
    random = model.config.vocab_size if trained["random_noise"] and noise_token is None else 0

    def make_noise(*shape):
      if random:
        return torch.randint(random, shape, device=device)
      return torch.full(shape, noise, device=device)

    block = block_size or trained["block_size"] or 8
    while not block_size and block > 4 and rows * block**2 > 2048:  # passes would take longer
      block -= 1
    # Without such training, drafts are what the last pass predicted.
    branches = block > 1 and bool(trained["block_size"])
    adapter = trained["adapter"] if branches else None
    weights = [p.data_ptr() for p in model.parameters()]
    key = (rows, block, branches, adapter, cuda_graph, device, *weights)
    if _LAST.get(model, ((),))[0] != key:
      _LAST.pop(model, None)  # its memory may be what the next one needs
      layout = Layout(block, branches, device)
      _LAST[model] = key, Passes(model, rows, adapter, cuda_graph, layout)
    passes = _LAST[model][1]
    sampler = _Sampler(logits_processor, generation_config.do_sample, device)
    pad = first if generation_config.pad_token_id is None else generation_config.pad_token_id
    mask, streamer = rest.get("attention_mask"), kwargs.get("streamer")
    with passes.adapter.applied():
      text, count = _decode(
        passes, sampler, stopping_criteria, ids, mask, make_noise, eos.to(device), pad, streamer
      )
    text = text.to(input_ids.device)
    if not generation_config.return_dict_in_generate:
      return text
    output = generation.GenerateDecoderOnlyOutput(sequences=text)
    output["passes"] = count
    return output

  return GenerationMixin.generate(model, inputs, custom_generate=decode, **kwargs)


def _decode(passes, sampler, criteria, ids, mask, make_noise, eos, pad, streamer):
  """Runs passes until every row has ended: ids [rows, longest], and how many passes each took."""
  layout, (rows, prompt), device = passes.layout, ids.shape, ids.device
  block = layout.block
  limit = min(c.max_length for c in criteria if isinstance(c, generation.MaxLengthCriteria))
  own_rules = (generation.EosTokenCriteria, generation.MaxLengthCriteria)
  others = generation.StoppingCriteriaList(c for c in criteria if not isinstance(c, own_rules))
  text = torch.nn.functional.pad(ids, (0, limit + block - prompt), value=pad)
  place = torch.arange(block, device=device)[None]
  length = torch.full((rows,), prompt, device=device)
  done, count_passes = torch.zeros_like(length, dtype=torch.bool), torch.zeros_like(length)
  drafts, longest, finished = make_noise(rows, block - 1), prompt, False
  passes.grow(prompt + layout.width, limit + layout.width)
  passes.read_prompt(ids, mask)
  while not finished:
    passes.grow(longest + layout.width, limit + layout.width)
    window = [text.gather(1, length[:, None] - 1), drafts, make_noise(rows, layout.width - block)]
    hidden = passes(torch.cat(window, 1), length - 1)
    text.scatter_(1, length[:, None] + place[:, :-1], drafts)
    position = (length - passes.pads)[:, None] + place
    own = sampler(passes.logits(hidden[:, :block]), position, text, length)
    right = (own[:, :-1] == drafts).long().cumprod(1).sum(1)
    text.scatter_(1, length[:, None] + place, own)  # what is past the count will be written over
    count = torch.minimum(right + 1, limit - length).minimum(_until_eos(own, eos))
    ended = torch.isin(own.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0], eos)
    for row in range(rows if others else 0):
      for i in range(int(count[row])):
        if others(text[row : row + 1, : int(length[row]) + i + 1], None).any():
          count[row], ended[row] = i + 1, True
          break
    count = count.masked_fill(done, 0)
    if layout.branches:  # what noise after the last right draft predicts of the time after `own`
      run = block + right[:, None] * (block - 1) + place[:, :-1]
      run = hidden.gather(1, run[:, :, None].expand(-1, -1, hidden.shape[2]))
      drafts = sampler(passes.logits(run), position[:, :-1] + right[:, None] + 1)
    else:
      ahead = own.gather(1, (right[:, None] + 1 + place[:, :-1]).clamp(max=block - 1))
      drafts = torch.where(
        place[:, 1:] + right[:, None] < block, ahead, make_noise(rows, block - 1)
      )
    if streamer is not None:
      streamer.put(text[0, int(length[0]) : int(length[0] + count[0])].cpu())
    length = length + count
    count_passes += ~done
    done = done | ended | (length >= limit)
    # Waits for the device, once a pass.
    longest, finished = torch.stack([length.max(), done.all().long()]).tolist()
  if streamer is not None:
    streamer.end()
  past = torch.arange(longest, device=device) >= length[:, None]
  return text[:, :longest].masked_fill(past, pad), count_passes


class _Sampler:
  """Chooses tokens from logits as `generate` was asked to.

  A sample is the argmax of scores plus Gumbel noise that depends on (seed, row, position) alone. So
  it is a function of the text before it, as a greedy token is, and drafts can be verified by it.
  torch's global generator gives the seed.
  """

  def __init__(self, processors, samples, device):
    self.processors, self.samples = processors, samples
    self.of_scores = [p for p in processors if type(p).__name__ in _OF_SCORES]
    self.seed = torch.randint(2**62, ()).to(device) if samples else None

  def __call__(self, logits, position, text=None, length=None):
    """int64 [rows, n] of logits [rows, n, vocabulary].

    Where processors look at the text before a token, `text` holds drafts from `length` on, and what
    comes after the first wrong one means nothing. Without it these processors are left out.
    """
    if text is None or len(self.of_scores) == len(self.processors):
      for processor in self.of_scores:
        logits = processor(None, logits.flatten(0, 1).float()).view_as(logits)
      return self._pick(logits, position)
    own = torch.zeros_like(position)
    for row, start in enumerate(length.tolist()):
      for i in range(own.shape[1]):
        # All rows alike, since a processor may know of each row's prompt.
        ids = text[row, : start + i].expand(len(text), -1)
        scores = self.processors(ids, logits[row, i].float().expand(len(text), -1))[row]
        own[row, i] = self._pick(scores[None, None], position[row : row + 1, i : i + 1], row)[0, 0]
        if own[row, i] != text[row, start + i]:
          break
    return own

  def _pick(self, scores, position, first_row=0):
    if self.samples:
      row = first_row + torch.arange(len(scores), device=scores.device)[:, None]
      count = ((row << 40) + (position << 20))[:, :, None]
      x = count + torch.arange(scores.shape[2], device=scores.device)
      # Bits of splitmix64 (Steele et al. 2014) at this place of its sequence.
      x = self.seed + x * -7046029254386353131
      x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
      x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
      uniform = ((x >> 41 & (1 << 23) - 1).float() + 0.5) / (1 << 23)
      scores = scores.float() - (-uniform.log()).log()
    return scores.argmax(-1)


@torch.no_grad()
def iterative_generate(
  model: PreTrainedModel,
  input_ids: torch.Tensor,
  eos_token_id: int | list[int] | None = None,
  pad_token_id: int | None = None,
  max_new_tokens: int = 256,
  add_eos_length: int = 7,
  refine_iter: int = 2,
  attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
  """Adds noise to the text and predicts it refine_iter times, block by block. Nothing is verified.

  Args:
    add_eos_length: noise tokens (EOS, unless the model was trained with another); a block is one
      token more.

  Returns:
    ids [rows, prompt + new]. A row ends at its own first EOS.
  """
  trained, (rows, prompt), device = _trained(model), input_ids.shape, model.device
  eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
  eos = torch.tensor(eos, device=device).reshape(-1)
  noise = int(eos[0]) if trained["noise_token"] is None else trained["noise_token"]
  passes = Passes(model, rows, trained["adapter"], False)
  text, cached, limit = input_ids.to(device), prompt - 1, prompt + max_new_tokens
  with passes.adapter.applied():
    passes.grow(prompt, limit)
    passes.read_prompt(text, attention_mask)
    while text.shape[1] < limit and not torch.isin(text[:, prompt:], eos).any(1).all():
      fresh = text.shape[1] - cached  # tokens whose keys and values are not known yet
      drafts = torch.full((rows, add_eos_length), noise, device=device)
      passes.grow(text.shape[1] + add_eos_length, limit + add_eos_length)
      start = torch.full((rows,), cached, device=device)
      for turn in range(refine_iter):
        width = fresh + add_eos_length
        passes.layout = Layout(width, False, device, noise_from=width if turn else fresh)
        hidden = passes(torch.cat([text[:, cached:], drafts[:, :add_eos_length]], 1), start)
        before, drafts = drafts, passes.logits(hidden[:, fresh - 1 :]).argmax(-1)
        if turn and torch.equal(before, drafts):  # further passes would repeat it
          break
      cached, text = text.shape[1], torch.cat([text, drafts], 1)
  new = text[:, prompt:limit]
  count, pad = _until_eos(new, eos), int(eos[0]) if pad_token_id is None else pad_token_id
  past = torch.arange(new.shape[1], device=device) >= count[:, None]
  new = new.masked_fill(past, pad)[:, : int(count.max())]
  return torch.cat([input_ids, new.to(input_ids.device)], 1)


def _until_eos(tokens, eos):
  """How many tokens each row has up to its first EOS and with it, or in all."""
  is_eos = torch.isin(tokens, eos).long()
  return (is_eos.cumsum(1) - is_eos == 0).sum(1)


def _trained(model, export=None):
  """What generation_config.json says of the training; None where it says nothing."""
  config = model.generation_config if export is None else GenerationConfig.from_pretrained(export)
  values = getattr(config, "refinement", None) or {}
  values = {k: values.get(k) for k in ("noise_token", "random_noise", "block_size", "adapter")}
  if values["adapter"]:
    values["adapter"] = (export or model.name_or_path, values["adapter"])
  return values


def _refuse(config, processors, rest):
  """Raises ValueError for what would be ignored otherwise."""
  mode = config.get_generation_mode()
  wrong = [] if mode in ("greedy_search", "sample") else [mode.value]
  wrong += sorted({type(p).__name__ for p in processors} & _REFUSED)
  outputs = (f"output_{name}" for name in ("scores", "logits", "attentions", "hidden_states"))
  wrong += [name for name in outputs if getattr(config, name)]
  wrong += [name for name in ("inputs_embeds", "token_type_ids") if rest.get(name) is not None]
  cache = rest.get("cache", rest.get("past_key_values"))
  wrong += ["past_key_values"] if cache is not None and cache.get_seq_length() else []
  if wrong:
    raise ValueError(
      f"This custom_generate does not do {', '.join(wrong)}; leave custom_generate out for these."
    )
