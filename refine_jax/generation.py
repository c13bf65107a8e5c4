"""What users call: `generate` for texts or token ids, `iterative_generate` for arrays."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from refine_jax import executables, sampler
from refine_jax.data import encode_prompt
from refine_jax.errors import UserError
from refine_jax.loading import Model

_SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Generation:
  """Answers, one a prompt, and what they cost.

  Attributes:
    tokens: ids without the prompt; the EOS that ended an answer is its last.
    texts: the same decoded, special tokens left out; None without a tokenizer.
    passes: forward passes that each row took part in after its prompt.
    stopped: whether each row ended by EOS or a stop string, and not by its limit.
    accepted: for each offset in the block, the share of passes that committed it.
    prefill_seconds, decode_seconds: wall clock, without compilation.
    compile_seconds: 0 where the program was there already.
  """

  tokens: list[list[int]]
  texts: list[str] | None
  passes: list[int]
  stopped: list[bool]
  accepted: list[float]
  prefill_seconds: float
  decode_seconds: float
  compile_seconds: float

  @property
  def tokens_per_pass(self) -> float:
    return sum(map(len, self.tokens)) / max(sum(self.passes), 1)

  @property
  def tokens_per_second(self) -> float:
    return sum(map(len, self.tokens)) / max(self.decode_seconds, 1e-9)

  def __str__(self) -> str:
    answers = self.texts if self.texts is not None else [str(t) for t in self.tokens]
    return "\n".join(answers) + (
      f"\n[{sum(map(len, self.tokens))} tokens, {self.tokens_per_pass:.2f} a pass,"
      f" {self.tokens_per_second:.0f} a second]"
    )


def generate(
  model: Model,
  prompts: Sequence,
  *,
  mode: str = "exact",
  block_size: int = 8,
  max_new_tokens: int = 256,
  draft: str | None = None,
  refine_iter: int = 2,
  tau: float = 0.9,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  noise_token: int | None = None,
  eos_token_id: int | Sequence[int] | None = None,
  stop: Sequence[str] = (),
  chat_template: str = "",
) -> Generation:
  """Decodes answers to prompts, a block of tokens a pass.

  Args:
    prompts: strings or chats (lists of {"role", "content"}), through the chat template; or lists
      of token ids, as they are.
    mode: one of sampler.MODES; sampler.Settings says what they and the next keys do.
    block_size: tokens that a pass can commit; 1 is autoregressive decoding.
    max_new_tokens: for each row, never overshot; EOS counts.
    draft: one of sampler.DRAFTS; default: "tail", for "fixed" "noise".
    seed: a row's sample depends on it and on the row's place among the prompts alone.
    noise_token: default: the first EOS id, as in training.
    eos_token_id: any of these ends a row; default: the model's.
    stop: strings that end a row where they first appear; they stay out of the text.
    chat_template: for tokenizers without one.

  Raises:
    UserError: an unknown mode or draft, an empty or too long prompt, text without a tokenizer.
  """
  stream = _Stream(
    model, prompts, mode=mode, block_size=block_size, max_new_tokens=max_new_tokens, draft=draft,
    refine_iter=refine_iter, tau=tau, temperature=temperature, top_k=top_k, top_p=top_p,
    seed=seed, noise_token=noise_token, eos_token_id=eos_token_id, stop=stop,
    chat_template=chat_template,
  )  # fmt: skip
  # Stop strings are looked for on the host, every so many passes.
  chunk = 8 if stop else np.iinfo(np.int32).max
  while not stream.step(chunk):
    pass
  return stream.result()


def stream(model: Model, prompts: Sequence, *, passes: int = 1, **options) -> Iterator[list[str]]:
  """`generate` piece by piece.

  Args:
    passes: between two pieces.
    options: those of `generate`.

  Yields:
    for each prompt the text committed since the last time; it ends after the last piece.
  """
  run = _Stream(model, prompts, **options)
  model.require_tokenizer()
  shown = [""] * len(prompts)
  finished = False
  while not finished:
    finished = run.step(passes)
    texts = run.result().texts
    if not finished:
      # Half a character decodes to a replacement sign; it waits for its other half.
      texts = [text.rstrip("�") for text in texts]
    yield [text[len(old) :] for text, old in zip(texts, shown, strict=True)]
    shown = texts


class _Stream:
  """One call's rows on their way; `step` runs passes, `result` says where they are."""

  def __init__(
    self, model, prompts, *, mode="exact", block_size=8, max_new_tokens=256, draft=None,
    refine_iter=2, tau=0.9, temperature=0.0, top_k=0, top_p=1.0, seed=0, noise_token=None,
    eos_token_id=None, stop=(), chat_template="",
  ):  # fmt: skip
    _require_one_of("mode", mode, sampler.MODES)
    _require_one_of("draft", draft or "tail", sampler.DRAFTS)
    if block_size < 1 or max_new_tokens < 1:
      raise UserError("block_size and max_new_tokens must be at least 1.")
    self.model, self.stop = model, (stop,) if isinstance(stop, str) else tuple(stop)
    if self.stop:
      model.require_tokenizer()
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
    self.cut = [None] * len(prompts)  # tokens before a stop string, where one was found
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
    arguments = (self.params, ids, lengths, limits, done, seeds)
    prefill, _ = sampler.programs(self.model.config, self.settings)
    size = executables.bucket(needed, _SMALLEST_BUCKET)
    run, self.compile_seconds = executables.compiled(prefill, arguments, size=size)
    state, self.prefill_seconds = executables.timed(run, *arguments)
    return state

  def step(self, passes: int) -> bool:
    """Runs up to `passes` passes; whether all rows are done."""
    if self.state is None:
      return True
    _, decode = sampler.programs(self.model.config, self.settings)
    arguments = (self.params, self.state, np.int32(passes))
    run, seconds = executables.compiled(decode, arguments)
    self.compile_seconds += seconds
    self.state, seconds = executables.timed(run, *arguments)
    self.decode_seconds += seconds
    if self.stop:
      self._look_for_stops()
    return bool(np.all(self.state.done))

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

  def result(self) -> Generation:
    if self.state is None:
      return Generation([], [], [], [], [], 0.0, 0.0, 0.0)
    count = len(self.prompts)
    tokens = [
      row if cut is None else row[:cut]
      for row, cut in zip(self._new_tokens(), self.cut, strict=True)
    ]
    passes = np.asarray(self.state.passes)[:count]
    stopped = [
      cut is not None or bool(row and row[-1] in self.settings.eos_ids)
      for row, cut in zip(tokens, self.cut, strict=True)
    ]
    texts = None
    if self.model.tokenizer is not None:
      texts = self.model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
      for stop in self.stop:
        texts = [text.split(stop)[0] for text in texts]
    accepted = np.asarray(self.state.accepted) / max(passes.sum(), 1)
    return Generation(
      tokens, texts, passes.tolist(), stopped, accepted.tolist(),
      self.prefill_seconds, self.decode_seconds, self.compile_seconds,
    )  # fmt: skip


def iterative_generate(
  model: Model,
  input_ids,
  eos_token_id: int | None = None,
  pad_token_id: int | None = None,
  max_new_tokens: int = 512,
  add_eos_length: int = 127,
  refine_iter: int = 2,
):
  """The document's sampler: append add_eos_length EOS, refine, commit the block, go on.

  Args:
    input_ids: int [B, T], every row a whole prompt of T tokens.
    pad_token_id: fills up rows that ended; default: the model's, or EOS.
    refine_iter: passes over each block (fewer where a pass changes nothing).

  Returns:
    numpy int32 [B, T + new], prompt included; new is that of the longest answer.
  """
  prompts = np.asarray(input_ids)
  if prompts.ndim != 2:
    raise UserError(f"input_ids must be [B, T], not of shape {prompts.shape}.")
  eos = list(model.eos_token_ids) if eos_token_id is None else [eos_token_id]
  if pad_token_id is None:
    pad_token_id = model.pad_token_id if model.pad_token_id is not None else (eos or [0])[0]
  out = generate(
    model, prompts.tolist(), mode="fixed", block_size=add_eos_length + 1,
    max_new_tokens=max_new_tokens, refine_iter=refine_iter, eos_token_id=eos,
  )  # fmt: skip
  width = max(map(len, out.tokens), default=0)
  result = np.full((len(prompts), prompts.shape[1] + width), pad_token_id, np.int32)
  result[:, : prompts.shape[1]] = prompts
  for row, tokens in zip(result, out.tokens, strict=True):
    row[prompts.shape[1] : prompts.shape[1] + len(tokens)] = tokens
  return result


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
