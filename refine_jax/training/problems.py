"""Problems answered while a run goes on."""

import dataclasses
from pathlib import Path

import jax

from refine_jax import processes
from refine_jax.config import Config
from refine_jax.decoding import loading
from refine_jax.evaluation import evaluate, reading, scoring
from refine_jax.hf.peft import LoadedAdapter
from refine_jax.model import adapters, layout
from refine_jax.model.transformer import ModelConfig
from refine_jax.training.choices import make_adapter


class Problems:
  """A slice of the problems, answered while a run goes on (config.eval.generate_every).

  Of several processes each answers all of them, on one device: none waits longer than that takes.

  Raises:
    UserError: what reading, scoring.choose and evaluate.unanswerable raise.
  """

  def __init__(self, config: Config, shape: ModelConfig, model_files: Path, dtype: str) -> None:
    self._prompt_key = config.data.prompt_key
    self._adapter = make_adapter(config)
    problems = reading.read(
      config.eval.generate_file,
      config.eval.generate_rows,
      "config.eval.generate_file",
      (self._prompt_key, "answer"),
    )
    self._rows = problems.rows
    self._score = scoring.choose("auto", problems.columns)
    self._model, self._dtype = loading.from_params({}, shape, model_files), dtype
    self._refused = evaluate.unanswerable(
      self._model, problems, self._prompt_key, config.data.chat_template
    )
    self._options = {
      "block_size": config.noise.block_size,
      "max_new_tokens": config.eval.generate_tokens,
      "chat_template": config.data.chat_template,
    }

  def answer(self, params: dict, frozen: dict | None = None) -> dict:
    """Metrics eval/solved, eval/tokens_per_pass and eval/not_stopped of these parameters.

    Args:
      params: all weights, or the factors of an adapter.
      frozen: the base of that adapter, in a form of layout.py.
    """
    device = jax.local_devices()[0]
    params, frozen = processes.whole((params, frozen))
    params = jax.tree.map(lambda x: jax.device_put(x, device).astype(self._dtype), params)
    model = dataclasses.replace(self._model, params=params)
    if self._adapter is not None:
      assert frozen is not None
      # The form stays where it can: what decoding computes with is then in part the same arrays.
      base = jax.device_put(frozen, device)
      if self._adapter.kind == "lora":
        base = layout.canonical(base, self._model.config)
        model = dataclasses.replace(model, params=adapters.merge(base, params, self._adapter))
      else:
        adapter = LoadedAdapter(self._adapter, params)
        model = dataclasses.replace(model, params=base, adapter=adapter)
    numbers, _ = evaluate.evaluate(
      model,
      self._rows,
      self._score,
      batch_size=len(self._rows),
      prompt_key=self._prompt_key,
      refused=self._refused,
      **self._options,
    )
    return {f"eval/{n}": numbers[n] for n in ("solved", "tokens_per_pass", "not_stopped")}
