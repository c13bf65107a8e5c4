"""Problems answered while a run goes on."""

import dataclasses
from pathlib import Path

import jax

from refine_jax.config import Config
from refine_jax.decoding import loading
from refine_jax.errors import UserError
from refine_jax.evaluation import evaluate, scoring
from refine_jax.model.transformer import ModelConfig


class Problems:
  """A slice of the problems, answered while a run goes on (config.eval.generate_every).

  Raises:
    UserError: what `read_rows` and `scoring.choose` raise; several hosts.
  """

  def __init__(self, config: Config, shape: ModelConfig, model_files: Path, dtype: str):
    if jax.process_count() > 1:
      raise UserError("config.eval.generate_every works on one host; set it to 0.")
    self._rows = evaluate.read_rows(
      config.eval.generate_file, config.eval.generate_rows, "config.eval.generate_file"
    )
    self._prompt_key = config.data.prompt_key
    for key in (self._prompt_key, "answer"):
      if key not in self._rows[0]:
        raise UserError(
          f"{config.eval.generate_file} (config.eval.generate_file) has no column {key!r}; it has"
          f" {', '.join(self._rows[0])}."
        )
    self._score = scoring.choose("auto", self._rows[0])
    self._model, self._dtype = loading.around({}, shape, model_files), dtype
    self._options = {
      "block_size": config.noise.block_size,
      "max_new_tokens": config.eval.generate_tokens,
      "chat_template": config.data.chat_template,
      "noise_token": config.noise.token_id,
    }

  def answer(self, params) -> dict:
    """Metrics eval/solved, eval/tokens_per_pass and eval/not_stopped of these parameters."""
    device = jax.local_devices()[0]
    params = jax.tree.map(lambda x: jax.device_put(x, device).astype(self._dtype), params)
    numbers, _ = evaluate.evaluate(
      dataclasses.replace(self._model, params=params),
      self._rows,
      self._score,
      batch_size=len(self._rows),
      prompt_key=self._prompt_key,
      **self._options,
    )
    return {f"eval/{n}": numbers[n] for n in ("solved", "tokens_per_pass", "not_stopped")}
