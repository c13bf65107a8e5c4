"""The forward passes of generate.py: layout and masks, cache, gated adapter, CUDA graph."""

import contextlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import cached_file


class Layout:
  """Which tokens a pass runs over: a window of `block`, then a run of noise for each of its tokens.

  Attributes:
    width: tokens of a row.
    offset: int64 [width], positions after that of the window's first token.
    sees: bool [width, width], whether a token (row) attends to another (column).
    noise_from: the first token that a gated adapter acts on.
  """

  def __init__(
    self, block: int, branches: bool, device: torch.device, noise_from: int | None = None
  ) -> None:
    self.block, self.branches = block, branches
    after = torch.arange(block if branches else 0).repeat_interleave(block - 1)
    run = torch.cat([torch.full((block,), -1), after])  # -1: the window
    index = torch.cat(
      [torch.arange(block), torch.arange(block - 1).repeat(len(after) // max(block - 1, 1))]
    )
    in_window = run < 0
    earlier = (run[:, None] == run) & (index[:, None] >= index)
    before_run = ~in_window[:, None] & in_window & (index <= run[:, None])
    self.sees = (earlier | before_run).to(device)
    self.offset = torch.where(in_window, index, run + 1 + index).to(device)
    self.width = len(run)
    self.noise_from = block if noise_from is None else noise_from


class Slots(Cache):
  """Keys and values in buffers [rows, size, heads, head_dim], written at each row's own columns.

  A token of the text stands in its own column of the text. What a pass writes after the tokens that
  are kept, the next pass writes over, so nothing is copied or cropped.
  """

  def __init__(self, rows: int) -> None:
    super().__init__(layers=[])
    self.rows, self.size, self.buffers = rows, 0, []
    self.columns = None  # int64 [rows, width], where a pass writes; None: a prompt, from 0 on

  def update(
    self,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    layer_idx: int,
    *args: Any,
    **kwargs: Any,
  ) -> tuple[torch.Tensor, torch.Tensor]:
    new = (key_states, value_states)
    if layer_idx == len(self.buffers):
      self.buffers.append([x.new_zeros(self.rows, self.size, x.shape[1], x.shape[3]) for x in new])
    if self.columns is None:
      for buffer, x in zip(self.buffers[layer_idx], new, strict=True):
        buffer[:, : x.shape[2]] = x.transpose(1, 2)
      return new
    columns = self.columns.to(key_states.device)
    row = torch.arange(self.rows, device=columns.device)[:, None]
    for buffer, x in zip(self.buffers[layer_idx], new, strict=True):
      buffer[row, columns] = x.transpose(1, 2)
    return tuple(buffer.transpose(1, 2) for buffer in self.buffers[layer_idx])

  def grow(self, size: int) -> None:
    self.buffers = [
      [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, size - self.size)) for x in layer]
      for layer in self.buffers
    ]
    self.size = size

  # What the model asks when it makes masks, which is for prompts alone: nothing is in here yet.

  def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
    return 0

  def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
    return 0

  def get_mask_sizes(self, query: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    # A length; in transformers 4 the positions.
    return (query if isinstance(query, int) else len(query)), 0


class Adapter:
  """A gated adapter: adds a low-rank change to the projections' outputs for noise tokens alone."""

  def __init__(self, model: PreTrainedModel, place: tuple[str, str] | None) -> None:
    self.noise_from = None  # None: all tokens are text
    self.factors = []
    if place is None:
      return
    source, folder = place
    with open(cached_file(source, f"{folder}/adapter_config.json"), encoding="utf-8") as file:
      values = json.load(file)
    tensors = load_file(cached_file(source, f"{folder}/adapter_model.safetensors"))
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
      module = model.get_submodule(
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
      )
      b = tensors[name.replace(".lora_A.", ".lora_B.")].float() * (
        values["lora_alpha"] / values["r"]
      )
      to = {"device": module.weight.device, "dtype": model.dtype}
      self.factors.append((module, tensors[name].to(**to), b.to(**to)))

  @contextlib.contextmanager
  def applied(self) -> Iterator[None]:
    """Puts it beside the projections for as long as the context lasts."""
    handles = [m.register_forward_hook(self._hook(a, b)) for m, a, b in self.factors]
    try:
      yield
    finally:
      for handle in handles:
        handle.remove()

  def _hook(self, a, b):
    linear = torch.nn.functional.linear

    def add(module, inputs, output):
      if self.noise_from is not None:
        output[:, self.noise_from :] += linear(linear(inputs[0][:, self.noise_from :], a), b)

    return add


class Passes:
  """Runs a model's decoder over prompts, and over a layout at each row's own place."""

  def __init__(
    self,
    model: PreTrainedModel,
    rows: int,
    adapter: tuple[str, str] | None,
    cuda_graph: bool,
    layout: Layout | None = None,
  ) -> None:
    config = model.config
    if config._attn_implementation not in ("sdpa", "eager"):
      raise ValueError(
        f"attn_implementation={config._attn_implementation!r} takes no mask from here; load the"
        ' model with attn_implementation="sdpa".'
      )
    self.kinds = set(getattr(config, "layer_types", None) or ())
    self.window = getattr(config, "sliding_window", None)
    if self.kinds - {"full_attention", "sliding_attention"} or getattr(
      config, "final_logit_softcapping", None
    ):
      raise ValueError(
        f"A model of type {config.model_type} with such layers or logits is not supported."
      )
    self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
    named = inspect.signature(self.decoder.forward).parameters
    self.cache_name = "cache" if "cache" in named else "past_key_values"
    self.adapter, self.cache, self.layout = Adapter(model, adapter), Slots(rows), layout
    self.dtype, self.device = model.dtype, model.device
    one_gpu = {p.device for p in model.parameters()} == {self.device} and self.device.type == "cuda"
    self.cuda_graph, self.graph = cuda_graph and one_gpu, None
    self.pads = torch.zeros(rows, dtype=torch.long, device=self.device)

  def read_prompt(self, ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Puts all but the last token of each prompt [rows, T] into the cache."""
    column, mask = torch.arange(ids.shape[1], device=self.device), None
    self.pads.zero_()
    if attention_mask is not None:
      mask = attention_mask.to(self.device)
      self.pads.copy_((mask.cumsum(1) == 0).sum(1))
      if not torch.equal(mask.bool(), column >= self.pads[:, None]):
        raise ValueError("Prompts of unequal lengths are padded on the left: padding_side='left'.")
      mask = mask[:, :-1]
    if ids.shape[1] == 1:
      return
    self.cache.columns = self.adapter.noise_from = None
    positions = (column[None, :-1] - self.pads[:, None]).clamp(min=0)
    self._decode(ids[:, :-1], mask, positions)

  def grow(self, needed: int, most: int) -> None:
    """Makes room for so many columns; `most` is what the call may come to need."""
    if needed > self.cache.size:
      size = min(max(2 * self.cache.size, 1024, needed), max(most, needed))
      self.cache.grow(-(-size // 64) * 64)  # attention's kernels want aligned masks
      self.graph = None

  def __call__(self, ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The decoder's output [rows, width, features]; a row's first token is in column `start`."""
    if not self.cuda_graph:
      return self._run(ids, start)
    if self.graph is None:
      self.ids, self.start = ids.clone(), start.clone()
      side = torch.cuda.Stream()
      side.wait_stream(torch.cuda.current_stream())
      with torch.cuda.stream(side):  # whatever is set up at the first run must not be recorded
        self._run(self.ids, self.start)
      torch.cuda.current_stream().wait_stream(side)
      self.graph = torch.cuda.CUDAGraph()
      with torch.cuda.graph(self.graph):
        self.hidden = self._run(self.ids, self.start)
    self.ids.copy_(ids)
    self.start.copy_(start)
    self.graph.replay()
    return self.hidden

  def _run(self, ids, start):
    layout, cache = self.layout, self.cache
    cache.columns = start[:, None] + torch.arange(layout.width, device=self.device)
    self.adapter.noise_from = layout.noise_from
    positions = (start - self.pads)[:, None] + layout.offset
    # Which token of the pass stands in a column of the cache; below 0: text from before the pass.
    column = torch.arange(cache.size, device=self.device)
    token = column - start[:, None]
    inside = token.clamp(0, layout.width - 1)
    sees = layout.sees[:, inside].transpose(0, 1) & (token < layout.width)[:, None]
    sees = torch.where(token[:, None] < 0, column >= self.pads[:, None, None], sees)
    if not (self.window and (not self.kinds or "sliding_attention" in self.kinds)):
      return self._decode(ids, self._mask(sees), positions)
    place = torch.where(token < 0, column - self.pads[:, None], positions.gather(1, inside))
    near = self._mask(sees & (positions[:, :, None] - place[:, None] < self.window))
    if not self.kinds:
      return self._decode(ids, near, positions)
    masks = {"full_attention": self._mask(sees), "sliding_attention": near}
    return self._decode(ids, masks, positions)

  def _mask(self, sees):
    """What is added to scores: [rows, 1, width, size]."""
    mask = torch.zeros(sees.shape, dtype=self.dtype, device=self.device)
    return mask.masked_fill(~sees, torch.finfo(self.dtype).min)[:, None]

  def _decode(self, ids, mask, positions):
    cache = {self.cache_name: self.cache}
    out = self.decoder(
      input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache
    )
    return out.last_hidden_state.to(self.device)  # the last layer's may be another

  def logits(self, hidden: torch.Tensor) -> torch.Tensor:
    """The head's scores of hidden states [rows, n, features]: [rows, n, vocabulary]."""
    return self.head(hidden).to(self.device)
