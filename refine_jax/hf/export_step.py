"""One step of a run as a release: all weights, or an adapter and where its base is."""

from pathlib import Path

from refine_jax.hf import export, export_adapter
from refine_jax.hf.card import model_card
from refine_jax.hf.config import read_json
from refine_jax.hf.peft import LoadedAdapter
from refine_jax.model import adapters


def export_step(
  workdir: str | Path,
  step: int,
  params: dict,
  *,
  dtype: str | None = None,
  identity: dict | None = None,
) -> Path | None:
  """WORKDIR/global_step_N/huggingface, where users of the PyTorch original look for it.

  Args:
    params: what the run trains: all parameters, or an adapter's factors.
    dtype: of what is written; default: bfloat16, of factors float32.
    identity: what the run's checkpoints say of the model: its "adapter", and the fingerprint of
      its "base".

  Returns:
    the directory; processes other than the first take part in gathering only.
  """
  from refine_jax import processes

  if processes.several():
    params = processes.whole(params)
  workdir = Path(workdir)
  output = workdir / f"global_step_{step}" / "huggingface"
  if not processes.is_first() or output.exists():
    return output
  identity = identity or {}
  shape = adapters.from_json(identity.get("adapter"))
  if shape is None:
    card = model_card(workdir, step)
    return export.export(params, workdir / "model", output, dtype=dtype or "bfloat16", card=card)
  return export_adapter.export_adapter(
    LoadedAdapter(shape, params),
    workdir / "model",
    output,
    base=read_json(workdir)["model"]["pretrained"],
    how="reference",
    fingerprint=identity["base"],
    dtype=dtype or "float32",
    card=model_card(workdir, step, base="reference"),
  )
