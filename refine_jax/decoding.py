"""One call's rows on their way through the sampler's programs."""

import jax.numpy as jnp
import numpy as np

from refine_jax import executables, sampler
from refine_jax.data import encode_prompt
from refine_jax.errors import UserError
from refine_jax.result import Generation, Pass, Trace, token_texts

_SMALLEST_BUCKET = 16


class Decoder:
  """One call's rows on their way; `step` runs passes, `result` says where they are."""

  def __init__(
    self, model, prompts, *, mode, block_size, max_new_tokens, draft, refine_iter, tau, temperature,
    top_k, top_p, seed, noise_token, eos_token_id, stop, chat_template, trace,
  ):  # fmt: skip
    """Options as in `generation.generate`; the prompts' pass is run here."""
    _require_one_of("mode", mode, sampler.MODES)
    _require_one_of("draft", draft or "tail", sampler.DRAFTS)
    if block_size < 1 or max_new_tokens < 1:
      raise UserError("block_size and max_new_tokens must be at least 1.")
    self.model, self.stop = model, (stop,) if isinstance(stop, str) else tuple(stop)
    if self.stop:
      model.require_tokenizer()
    if "" in self.stop:
      raise UserError("A stop string is empty; it would end every answer at once.")
    eos = model.eos_token_ids if eos_token_id is None else np.atleast_1d(eos_token_id).tolist()
    if noise_token is None:
      noise_token = eos[0] if eos else 0
    self.settings = sampler.Settings(
      mode="exact" if mode == "ar" else mode,
      block=1 if mode == "ar" else block_size,
      draft=draft or ("noise" if mode == "fixed" else "tail"),
      refine_iter=refine_iter, tau=tau, temperature=temperature, top_k=top_k, top_p=top_p,
      noise_token=int(noise_token), eos_ids=tuple(map(int, eos)),
    )  # fmt: skip
    self.prompts = [_ids(model, p, chat_template) for p in prompts]
    self.max_new_tokens, self.seed = max_new_tokens, seed
    self.compile_seconds = self.decode_seconds = self.prefill_seconds = 0.0
    self._programs = {}
    self.cut = [None] * len(prompts)  # tokens before a stop string, where one was found
    self.trace = [[] for _ in prompts] if trace else None
    self.params = model.decoding_params
    self.state = self._prefill() if prompts else None

  def _prefill(self) -> sampler.State:
    longest = max(map(len, self.prompts))
    context = self.model.config.max_length
    if longest >= context:
      raise UserError(
        f"A prompt of {longest} tokens leaves no room in the model's {context} positions."
      )
    rows = executables.bucket(len(self.prompts), 1)
    width = executables.bucket(longest, _SMALLEST_BUCKET)
    ids = np.zeros((rows, width), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(self.prompts):
      ids[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    limits = np.minimum(lengths + self.max_new_tokens, context).astype(np.int32)
    # Windows reach beyond the last token; a buffer that ended there would shift them.
    needed = max(int(limits.max()) + 2 * self.settings.block, width)
    done = np.arange(rows) >= len(self.prompts)
    seeds = np.random.default_rng(self.seed).integers(0, 2**32, rows, dtype=np.uint32)
    arguments = (self.params, ids, lengths, np.int32(self.settings.noise_token))
    prefill = sampler.prefill_program(self.model.config)
    size = executables.bucket(needed, _SMALLEST_BUCKET)
    run, self.compile_seconds = executables.compiled(prefill, arguments, size=size)
    state, self.prefill_seconds = executables.timed(run, *arguments)
    return sampler.begin(*state, lengths, limits, done, seeds, self.settings)

  def step(self, passes: int) -> bool:
    """Runs up to `passes` passes; whether all rows are done."""
    if self.state is None:
      return True
    if self.trace is None:
      decode = sampler.programs(self.model.config, self.settings)[0]
      self.state = self._timed(decode, self.params, self.state, np.int32(passes))
    else:
      for _ in range(passes):
        self._traced_pass()
        if np.all(self.state.done):
          break
    if self.stop:
      self._look_for_stops()
    return bool(np.all(self.state.done))

  def _timed(self, function, *arguments):
    # Shapes stay as they are, and looking up those of all parameters takes as long as a pass.
    if function not in self._programs:
      self._programs[function], seconds = executables.compiled(function, arguments)
      self.compile_seconds += seconds
    result, seconds = executables.timed(self._programs[function], *arguments)
    self.decode_seconds += seconds
    return result

  def _traced_pass(self):
    one_pass = sampler.programs(self.model.config, self.settings)[1]
    # Copies, because the state's own buffers are given away to the program.
    lengths, limits, done = (
      np.array(x) for x in (self.state.length, self.state.limit, self.state.done)
    )
    self.state, seen = self._timed(one_pass, self.params, self.state)
    predicted, probabilities, counts = map(np.asarray, seen)
    for row, prompt in enumerate(self.prompts):
      if not done[row]:
        room = limits[row] - lengths[row]
        self.trace[row].append(
          Pass(
            int(lengths[row]) - len(prompt), predicted[row, :room].tolist(),
            probabilities[row, :room].tolist(), int(counts[row]),
          )
        )  # fmt: skip

  def _look_for_stops(self):
    done = np.array(self.state.done)
    for row, tokens in enumerate(self._new_tokens()):
      text = self.model.tokenizer.decode(tokens)
      if self.cut[row] is None and any(s in text for s in self.stop):
        # The shortest run of tokens whose text holds a stop string.
        self.cut[row] = next(
          n for n in range(len(tokens) + 1)
          if any(s in self.model.tokenizer.decode(tokens[:n]) for s in self.stop)
        )  # fmt: skip
        done[row] = True
    self.state = self.state._replace(done=jnp.asarray(done))

  def _new_tokens(self) -> list[list[int]]:
    tokens, lengths = np.asarray(self.state.tokens), np.asarray(self.state.length)
    return [
      tokens[row, len(prompt) : lengths[row]].tolist() for row, prompt in enumerate(self.prompts)
    ]

  def _answers(self) -> list[list[int]]:
    return [
      row if cut is None else row[:cut]
      for row, cut in zip(self._new_tokens(), self.cut, strict=True)
    ]

  def texts(self) -> list[str] | None:
    """The answers so far, stop strings and what came after them left out."""
    if self.state is None:
      return []
    if self.model.tokenizer is None:
      return None
    texts = self.model.tokenizer.batch_decode(self._answers(), skip_special_tokens=True)
    for stop in self.stop:
      texts = [text.split(stop)[0] for text in texts]
    return texts

  def result(self) -> Generation:
    if self.state is None:
      trace = None if self.trace is None else Trace([], [], {})
      return Generation([], [], [], [], [], [], 0.0, 0.0, 0.0, trace)
    tokens = self._answers()
    passes = np.asarray(self.state.passes)[: len(self.prompts)]
    stopped = [
      cut is not None or bool(row and row[-1] in self.settings.eos_ids)
      for row, cut in zip(tokens, self.cut, strict=True)
    ]
    accepted = np.asarray(self.state.accepted) / max(passes.sum(), 1)
    return Generation(
      self.prompts, tokens, self.texts(), passes.tolist(), stopped, accepted.tolist(),
      self.prefill_seconds, self.decode_seconds, self.compile_seconds, self._finished_trace(),
    )  # fmt: skip

  def _finished_trace(self) -> Trace | None:
    if self.trace is None:
      return None
    tokenizer = self.model.tokenizer
    ids = {t for passes in self.trace for seen in passes for t in seen.tokens}
    texts = [str(p) if tokenizer is None else tokenizer.decode(p) for p in self.prompts]
    return Trace([list(passes) for passes in self.trace], texts, token_texts(tokenizer, ids))


def _ids(model, prompt, chat_template) -> list[int]:
  text = isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], dict))
  if text:
    ids = encode_prompt(model.require_tokenizer(), prompt, chat_template)
  else:
    ids = [int(i) for i in prompt]
    if ids and not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
      raise UserError(f"A prompt has ids outside the vocabulary of {model.config.vocab_size}.")
  if not ids:
    raise UserError("A prompt is empty; give at least one token.")
  return ids


def _require_one_of(name, value, known):
  if value not in known:
    raise UserError(f"{name}={value!r} is not known; it is one of {', '.join(known)}.")
