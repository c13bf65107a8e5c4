"""One call's rows on their way through the sampler's programs."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.decoding import compile_cache, sampler, sampling
from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import check_options, default_block_size, default_draft
from refine_jax.decoding.prompts import prompt_ids
from refine_jax.decoding.result import Generation, Pass, Trace, token_texts
from refine_jax.decoding.settings import Settings, least_window
from refine_jax.errors import UserError
from refine_jax.interrupt import held_back
from refine_jax.text import detokenize
from refine_jax.text.vocabulary import check_ids

_SMALLEST_BUCKET = 16
_ROWS_SHOWN = 8


class Decoder:
  """One call's rows on their way; `step` runs passes, `result` says where they are."""

  def __init__(
    self,
    model: Model,
    prompts: Sequence,
    *,
    mode: str,
    block_size: int | None,
    max_new_tokens: int,
    draft: str | None,
    refine_iter: int,
    tau: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    first_row: int,
    noise_token: int | None,
    eos_token_id: int | Sequence[int] | None,
    stop: str | Sequence[str],
    chat_template: str,
    trace: bool,
    follow: bool,
  ) -> None:
    """Options as in `generation.generate`; the prompts' pass is run here.

    Args:
      follow: keep `answers` after every `step`.
    """
    prompts = _listed(prompts)
    check_options(
      mode=mode,
      block_size=block_size,
      max_new_tokens=max_new_tokens,
      draft=draft,
      seed=seed,
      refine_iter=refine_iter,
      tau=tau,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      first_row=first_row,
      stop=stop,
    )
    self.model = model
    eos: Sequence[int] = (
      model.eos_token_ids if eos_token_id is None else np.atleast_1d(eos_token_id).tolist()
    )
    trained = model.refinement
    random_noise = noise_token is None and trained is not None and trained.random_noise
    default_noise = trained.noise_token if trained else eos[0] if eos else 0
    noise_id = default_noise if noise_token is None else noise_token
    if block_size is None:
      block_size = default_block_size(trained, mode, draft, len(prompts))
    stops, stop_ids = _stops(model, stop)
    for what, ids in (("noise_token", [noise_id]), ("eos_token_id", eos), ("stop", stop_ids)):
      check_ids(ids, model.config.vocab_size, what, model.tokenizer)
    rows = compile_cache.bucket(len(prompts), 1)
    self.settings = Settings(
      mode="exact" if mode == "ar" else mode,
      block=1 if mode == "ar" else block_size,
      draft=draft or default_draft(trained, mode),
      refine_iter=refine_iter,
      tau=tau,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      noise_token=int(noise_id),
      random_noise=random_noise,
      eos_ids=(*map(int, eos), *stop_ids),
      engine=model.cache_engine,
      least_window=least_window(rows),
    )
    self.prompts = [
      prompt_ids(model, prompt, chat_template, f"Prompt {number}")
      for number, prompt in enumerate(prompts, first_row + 1)
    ]
    self.max_new_tokens, self.seed, self.first_row = max_new_tokens, seed, first_row
    self.compile_seconds = self.decode_seconds = self.prefill_seconds = 0.0
    self._programs: dict[Any, Any] = {}
    # Text as it comes, where something looks at it before the end.
    self.answers: list[detokenize.GrowingAnswer] | None = None
    if stops or follow:
      self.answers = [detokenize.GrowingAnswer(model.tokenizer, stops) for _ in self.prompts]
    self.trace: list[list[Pass]] | None = [[] for _ in self.prompts] if trace else None
    # One token a pass needs no drafts, and so no adapter.
    self.params = model.base_decoding_params if mode == "ar" else model.decoding_params
    self.state: sampler.State | None = self._prefill(rows) if self.prompts else None

  def _prefill(self, rows: int) -> sampler.State:
    longest = max(map(len, self.prompts))
    context = self.model.config.max_length
    width = compile_cache.bucket(longest, _SMALLEST_BUCKET)
    ids = np.zeros((rows, width), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(self.prompts):
      ids[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    limits = np.minimum(lengths + min(self.max_new_tokens, context), context)
    # Windows reach beyond the last token; a buffer that ended there would shift them.
    ahead = self.settings.drafts_of_prompt
    needed = max(int(limits.max()) + self.settings.reach, width + ahead)
    done = np.arange(rows) >= len(self.prompts)
    # Leading numbers do not depend on how many are drawn.
    end = self.first_row + rows
    seeds = np.random.default_rng(self.seed).integers(0, 2**32, end, dtype=np.uint32)[-rows:]
    arguments = (self.params, ids, lengths, np.int32(self.settings.noise_token))
    prefill = sampler.prefill_program(self.model.config)
    run, self.compile_seconds = compile_cache.compiled(
      prefill,
      arguments,
      compile_cache.compiler_options(rows * (width + ahead)),
      size=compile_cache.bucket(needed, _SMALLEST_BUCKET),
      ahead=ahead,
      engine=self.settings.engine,
      random_noise=self.settings.random_noise,
    )
    state, self.prefill_seconds = compile_cache.timed(run, *arguments)
    tokens, caches = state
    return sampler.begin(tokens, caches, lengths, limits, done, seeds, self.settings)

  def step(self, passes: int) -> bool:
    """Runs up to `passes` passes; whether all rows are done."""
    if self.state is None:
      return True
    if self.trace is None:
      decode = sampler.programs(self.model.config, self.settings)[0]
      self._run(decode, np.int32(passes))
    else:
      for _ in range(passes):
        self._traced_pass()
        if self._finished():
          break
    if self.answers is not None:
      self._follow()
    return self._finished()

  @property
  def _rows(self) -> sampler.State:
    """The state of a call that has prompts."""
    assert self.state is not None
    return self.state

  def _finished(self) -> bool:
    # numpy's all, given an array of jax, would run a program on the device.
    return bool(np.asarray(self._rows.done).all())

  def _on_host(self) -> sampler.State:
    """The state without its caches, fetched in one go."""
    return jax.device_get(self._rows._replace(caches=[]))

  def _run(self, function: Callable, *more: Any) -> Any:
    """What the program gives; the state in it becomes ours."""
    arguments = (self.params, self.state, *more)
    # Shapes stay as they are, and looking up those of all parameters takes as long as a pass.
    if function not in self._programs:
      tokens = len(self._rows.done) * self.settings.tokens
      options = compile_cache.compiler_options(tokens)
      self._programs[function], seconds = compile_cache.compiled(function, arguments, options)
      self.compile_seconds += seconds
    start = time.perf_counter()
    # The old state's memory is given away by the call, so no interrupt may come between the two.
    with held_back():
      result = self._programs[function](*arguments)
      self.state = result if isinstance(result, sampler.State) else result[0]
    jax.block_until_ready(result)
    self.decode_seconds += time.perf_counter() - start
    return result

  def _traced_pass(self):
    assert self.trace is not None
    one_pass = sampler.programs(self.model.config, self.settings)[1]
    # Copies, because the state's own buffers are given away to the program.
    before = jax.tree.map(np.array, self._on_host())
    _, seen = self._run(one_pass)
    predicted, probabilities, counts = jax.device_get(seen)
    for row, prompt in enumerate(self.prompts):
      if not before.done[row]:
        room = before.limit[row] - before.length[row]
        self.trace[row].append(
          Pass(
            int(before.length[row]) - len(prompt),
            predicted[row, :room].tolist(),
            probabilities[row, :room].tolist(),
            int(counts[row]),
          )
        )

  def _follow(self):
    """Lets the answers grow, and ends rows with a stop string."""
    state = self._on_host()
    done = np.array(state.done)
    for row, (answer, tokens) in enumerate(zip(self.answers or (), self._new(state), strict=True)):
      answer.extend(tokens[len(answer.tokens) :], bool(done[row]))
      done[row] |= answer.stopped
    self.state = self._rows._replace(done=jnp.asarray(done))

  def _new(self, state: sampler.State) -> list[list[int]]:
    """The rows' committed tokens.

    Raises:
      UserError: logits of a row were not finite.
    """
    tokens = [
      state.tokens[row, len(prompt) : state.length[row]].tolist()
      for row, prompt in enumerate(self.prompts)
    ]
    bad = [row for row, new in enumerate(tokens) if sampling.NOT_FINITE in new[-1:]]
    if bad:
      shown = ", ".join(f"{self.first_row + row + 1}" for row in bad[:_ROWS_SHOWN])
      more = f" and {len(bad) - _ROWS_SHOWN} more" if len(bad) > _ROWS_SHOWN else ""
      raise UserError(
        f"The model's logits are not finite (NaN or infinite) in prompt {shown}{more}, the first"
        f" time after {len(tokens[bad[0]]) - 1} tokens of its answer; load the model with"
        " dtype=float32 or bfloat16, and if it stays so, its weights are damaged."
      )
    return tokens

  def result(self) -> Generation:
    if self.state is None:
      trace = None if self.trace is None else Trace([], [], {})
      return Generation([], [], [], [], [], [], 0.0, 0.0, 0.0, trace)
    state = self._on_host()
    tokens = self._new(state)
    stopped = [bool(row and row[-1] in self.settings.eos_ids) for row in tokens]
    texts: Any = self.model.tokenizer and [
      detokenize.decode(self.model.tokenizer, t) for t in tokens
    ]
    for row, answer in enumerate(self.answers or ()):
      if answer.stopped:
        tokens[row], texts[row], stopped[row] = answer.tokens, answer.text, True
    passes = state.passes[: len(self.prompts)]
    accepted = state.accepted / max(passes.sum(), 1)
    return Generation(
      self.prompts,
      tokens,
      texts,
      passes.tolist(),
      stopped,
      accepted.tolist(),
      self.prefill_seconds,
      self.decode_seconds,
      self.compile_seconds,
      self._finished_trace(),
    )

  def _finished_trace(self) -> Trace | None:
    if self.trace is None:
      return None
    tokenizer = self.model.tokenizer
    ids = {t for passes in self.trace for seen in passes for t in seen.tokens}
    texts = [str(p) if tokenizer is None else tokenizer.decode(p) for p in self.prompts]
    return Trace([list(passes) for passes in self.trace], texts, token_texts(tokenizer, ids))


def _listed(prompts) -> list:
  if isinstance(prompts, str) or not isinstance(prompts, Iterable):
    raise UserError(f"prompts is {prompts!r}; give a list of prompts.")
  return list(prompts)


def _stops(model, stop) -> tuple[tuple[str, ...], list[int]]:
  """Strings to look for in the text, and ids of those that are special tokens, which it lacks."""
  stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
  special = detokenize.special_ids(model.require_tokenizer()) if stops else {}
  return tuple(s for s in stops if s not in special), [special[s] for s in stops if s in special]
