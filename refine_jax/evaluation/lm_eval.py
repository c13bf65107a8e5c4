"""lm-evaluation-harness with a model that decodes in blocks.

    python -m refine_jax.lm_eval --model refine_jax \
        --model_args pretrained=DIR,mode=exact --tasks gsm8k

takes every argument of `lm_eval`; pretrained is what `refine_jax.load` takes. The other arguments
of the model are those of RefineLM, those of --gen_kwargs are in harness_options.py. Needs the
package: pip install -e '.[eval]'.
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

try:
  from lm_eval import utils
  from lm_eval.__main__ import HarnessCLI, cli_evaluate
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
except ImportError:
  missing = "lm-eval is not installed; pip install -e '.[eval]'"
  # Of the program one line, of the module what an import raises.
  raise (
    SystemExit(f"error: {missing}") if __name__ == "__main__" else ImportError(missing)
  ) from None

from refine_jax.cli import entry_point
from refine_jax.decoding import loading, programs
from refine_jax.decoding.call import Call
from refine_jax.decoding.options import Options
from refine_jax.decoding.requests import Request
from refine_jax.decoding.requests import requests as decoding_requests
from refine_jax.errors import UserError
from refine_jax.evaluation import harness_options
from refine_jax.model import head, transformer
from refine_jax.text import template
from refine_jax.text.tokenizer import encode, encode_start, prefix_ids
from refine_jax.text.vocabulary import check_ids

_SMALLEST_BUCKET = 64
_log = logging.getLogger(__name__)


@register_model("refine_jax")
class RefineLM(TemplateLM):
  """What the harness asks of a model.

  Args:
    pretrained: a Hugging Face directory, a hub name or the workdir of a run.
    batch_size: requests at a time; "auto" is a fixed number, at most max_batch_size.
    max_gen_toks: new tokens where the task does not say.
    dtype: of the parameters; default: as stored.
    device: the harness's --device; its default, or what JAX runs on anyway.
    options: of decoding.options, those in harness_options.DECODING.

  Raises:
    UserError: an argument that is not known, or cannot be; before the model is loaded.
  """

  def __init__(
    self,
    pretrained: str | None = None,
    batch_size: int | str = harness_options.BATCH_SIZE,
    max_gen_toks: int | str = 256,
    dtype: str | None = None,
    device: str | None = None,
    max_batch_size: int | str | None = None,
    **options: Any,
  ) -> None:
    super().__init__()
    harness_options.check_model_args(pretrained, device, options)
    self.batch_size = harness_options.read_batch_size(batch_size, max_batch_size)
    self.max_gen_toks = harness_options.whole("max_gen_toks", max_gen_toks)
    self.options = options
    assert pretrained is not None  # checked above
    self.model = loading.load(pretrained, dtype=dtype)
    self.tokenizer = self.model.require_tokenizer()
    self._prefix = prefix_ids(self.tokenizer)

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """What an empty context begins with."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    return self.tokenizer.name_or_path.replace("/", "__")

  def apply_chat_template(
    self, chat_history: list[dict], add_generation_prompt: bool = True
  ) -> str:
    return template.render(
      self.tokenizer,
      chat_history,
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    if add_special_tokens is None:  # a chat template may have put it there already
      return encode_start(self.tokenizer, string, self._prefix)
    ids = encode(self.tokenizer, [string])[0]
    return [*self._prefix, *ids] if add_special_tokens else ids

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list:
    """For each context and continuation: (its log-probability, whether it is the greedy one)."""
    # The harness looks at the first token of the two, which not every row of a data set has.
    asked = [request for request in requests if any(request.args)]
    scored = iter(super().loglikelihood(asked, disable_tqdm) if asked else [])
    return [next(scored) if any(request.args) else (0.0, True) for request in requests]

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
    """For each (texts, context ids, continuation ids): (its log-probability, whether greedy)."""
    for number, (_, context, answer) in enumerate(requests, 1):
      check_ids(
        [*context, *answer], self.model.config.vocab_size, f"Request {number}", self.tokenizer
      )
    results: list[Any] = [None] * len(requests)
    # Longest first: requests of one length share a batch, and too little memory shows at once.
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
    for part in tqdm(_chunks(order, self.batch_size), disable=disable_tqdm):
      scored = self._score([requests[i][1:] for i in part])
      for i, result in zip(part, scored, strict=True):
        results[i] = result
        if not math.isfinite(result[0]):
          raise UserError(_not_finite(requests[i], i + 1, result[0]))
    return results

  def _score(self, pairs):
    limit = self.model.config.max_length
    # The last token is predicted and not read.
    rows = [(context + answer)[-(limit + 1) :] for context, answer in pairs]
    width = programs.bucket(max(map(len, rows)) - 1, _SMALLEST_BUCKET)
    ids = np.zeros((self.batch_size, width), np.int32)
    targets, weights = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    for b, (row, (_, answer)) in enumerate(zip(rows, pairs, strict=True)):
      length, count = len(row) - 1, min(len(answer), len(row) - 1)
      ids[b, :length], targets[b, :length] = row[:-1], row[1:]
      weights[b, length - count : length] = 1.0
    losses, right = jax.device_get(
      _token_losses(self.model.params, ids, targets, weights, config=self.model.config)
    )
    return [
      (-float(losses[b].sum()), bool((right[b] | (weights[b] == 0)).all()))
      for b in range(len(pairs))
    ]

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probabilities of whole texts, in disjoint windows of the model's length."""
    results = []
    for request in tqdm(requests, disable=disable_tqdm):
      windows = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.model.config.max_length,
        context_len=1,
      )
      pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
      total = sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
      results.append(total)
    return results

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Answers up to the task's stop strings, of all requests together."""
    results: list[Any] = [None] * len(requests)
    groups: dict = {}
    arguments: list[Any] = [request.args for request in requests]
    for i, (_, wanted) in enumerate(arguments):
      groups.setdefault(repr(sorted(wanted.items())), []).append(i)
    # All of them before any model call: what is refused is refused at the start.
    options = {
      kind: self.options | harness_options.read_gen_kwargs(arguments[i[0]][1], self.max_gen_toks)
      for kind, i in groups.items()
    }
    wanted = {
      request: i
      for kind, indices in groups.items()
      for request, i in zip(
        self._requests([arguments[i][0] for i in indices], options[kind], indices),
        indices,
        strict=True,
      )
    }
    slots = min(self.batch_size, len(wanted))
    call = Call(self.model, list(wanted), slots=slots)
    with tqdm(total=len(requests), disable=disable_tqdm) as bar:
      while call.busy:
        for answer in call.step():
          i = wanted[answer.request]
          results[i] = answer.text
          self.cache_hook.add_partial("generate_until", arguments[i], answer.text)
          bar.update()
    return results

  def _requests(self, contexts, options, rows) -> list[Request]:
    """Requests of one kind; a context keeps its end where it is too long.

    An answer has max_new_tokens of the model's positions for itself, but never more than half of
    them: beyond that, it ends where the positions do.
    """
    length = self.model.config.max_length
    room = max(length - options["max_new_tokens"], length - length // 2)
    prompts = [self.tok_encode(c) or [self.prefix_token_id] for c in contexts]
    cut = sum(len(p) > room for p in prompts)
    if cut:
      _log.warning(
        "%d of %d contexts are longer than %d tokens (the model's %d positions less those of the"
        " answer) and lost their beginning.",
        *(cut, len(prompts), room, length),
      )
    prompts = [p[-room:] for p in prompts]
    return decoding_requests(self.model, prompts, Options(**options), rows=rows)


def _not_finite(request, number: int, value: float) -> str:
  """The message for a log-probability that no probability has."""
  texts, context, answer = request
  shown = "a window of a text" if texts is None else f"{texts[0][-60:]!r} -> {texts[1][:60]!r}"
  return (
    f"Request {number} ({shown}; {len(context)} and {len(answer)} tokens) has the log-likelihood"
    f" {value}: the model's logits are not finite there. Try --model_args dtype=float32, and check"
    " the weights."
  )


@functools.partial(jax.jit, static_argnames="config")
def _token_losses(params, ids_BT, targets_BT, weights_BT, *, config):
  """Weighted cross-entropies, and whether each target is the most likely token: [B, T]."""
  x_BTD = loading.hidden_states(params, config, ids_BT, jnp.ones_like(ids_BT))
  matrix = transformer.head_matrix(params).astype(x_BTD.dtype)
  _, output = head.cross_entropy(x_BTD, matrix, targets_BT, weights_BT)
  return output.losses * weights_BT, output.predictions == targets_BT


def _chunks(items: list, size: int) -> list:
  return [items[i : i + size] for i in range(0, len(items), size)]


@entry_point
def main() -> None:
  arguments = HarnessCLI().parse_args()
  # The command's own; those of tasks are read when their requests come.
  harness_options.read_gen_kwargs(getattr(arguments, "gen_kwargs", None) or {}, 1)
  cli_evaluate()
