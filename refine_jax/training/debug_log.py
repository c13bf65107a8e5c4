"""One example's way through the rounds as text: WORKDIR/log/debug.log."""

from pathlib import Path

import numpy as np

from refine_jax.batch import Batch
from refine_jax.text.tokenizer import Tokenizer

# Around each token that differs from the clean one.
_OPEN, _CLOSE = "⟦", "⟧"


def format_example(tokenizer: Tokenizer, step: int, row: Batch, rounds: dict) -> str:
  """The first example of a packed row.

  Args:
    row: numpy arrays [T] of a batch.
    rounds: numpy "inputs" and "predictions", int32 [rounds, T] (train_step.debug_rounds).
  """
  mine = row.segment_ids == 1
  response = mine & row.response_mask
  clean = row.ids[response]
  prompt = tokenizer.decode(row.ids[mine & ~row.response_mask])
  lines = [
    f"=== step {step}, example {row.example_ids[0]}",
    f"prompt  {_one_line(prompt)}",
    f"t0      {_marked(tokenizer, clean, clean)}",
  ]
  for i, ids in enumerate([*rounds["inputs"], rounds["predictions"][-1]]):
    tokens = ids[response]
    last = i == len(rounds["inputs"])
    name = "out" if last else f"s{i}"
    right = np.mean(tokens == clean)
    lines.append(f"{name:<7} {_marked(tokenizer, tokens, clean)}  ({right:.0%} as in t0)")
  return "\n".join(lines) + "\n\n"


def append(workdir: Path, text: str) -> None:
  """Adds to WORKDIR/log/debug.log, in a workdir that is there.

  Raises:
    OSError: it could not be written.
  """
  path = workdir / "log" / "debug.log"
  path.parent.mkdir(exist_ok=True)
  with open(path, "a", encoding="utf-8") as file:
    file.write(text)


def _marked(tokenizer, tokens, clean):
  """Decodes runs of equal and of differing tokens separately, the latter between marks."""
  changed = tokens != clean
  cuts = np.flatnonzero(np.diff(changed)) + 1
  pieces = []
  for run, differs in zip(np.split(tokens, cuts), np.split(changed, cuts), strict=True):
    text = tokenizer.decode(run)
    pieces.append(f"{_OPEN}{text}{_CLOSE}" if len(differs) and differs[0] else text)
  return _one_line("".join(pieces))


def _one_line(text):
  return text.replace("\n", "\\n")
