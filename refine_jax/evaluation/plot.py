"""Accuracy against tokens a pass as a picture, with the settings' names at their points."""

from pathlib import Path
from typing import Any

from refine_jax.evaluation import report

_SIZE = (8, 4.8)
_FONT = 8.5
# Where a name may stand beside its point, in points (1/72 inch): the first place that is free.
_PLACES = [
  (7, 5), (7, -12), (-7, 5), (-7, -12), (7, 18), (-7, 18), (7, -25), (-7, -25), (7, 31), (7, -38),
  (-7, 31), (-7, -38), (7, 44), (-7, 44), (7, -51), (-7, -51),
]  # fmt: skip


def accuracy(results: list[dict], path: Path) -> bool:
  """Draws a point a setting, its 95 % interval and its name; False without matplotlib.

  Settings of one mode are joined by a line. What stands before the first space or colon of a mode
  gives the colour.

  Args:
    results: mode, block_size, tokens_per_pass, solved, solved_low and solved_high of each setting.
  """
  try:
    import matplotlib
  except ImportError:
    return False
  matplotlib.use("Agg")
  from matplotlib import pyplot

  kinds = list(dict.fromkeys(_kind(r["mode"]) for r in results))
  figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
  for mode in dict.fromkeys(r["mode"] for r in results):
    points = [r for r in results if r["mode"] == mode]
    solved = [100 * r["solved"] for r in points]
    spread = [
      [100 * (r["solved"] - r["solved_low"]) for r in points],
      [100 * (r["solved_high"] - r["solved"]) for r in points],
    ]
    color = f"C{kinds.index(_kind(mode)) % 10}"
    axes.errorbar(
      [r["tokens_per_pass"] for r in points],
      solved,
      yerr=spread,
      marker="o",
      capsize=2,
      elinewidth=0.8,
      alpha=0.85,
      color=color,
    )
  axes.set_xlabel("tokens a pass")
  axes.set_ylabel("solved, % (95 % interval)")
  axes.grid(alpha=0.25)
  axes.margins(x=0.09, y=0.09)
  _name_points(figure, axes, results, kinds)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
  return True


def _kind(mode: str) -> str:
  return mode.replace(":", " ").partition(" ")[0]


def _name(result: dict) -> str:
  block = f", {report.size(result)}" if result["block_size"] != 1 else ""
  return result["mode"].replace(":", " ") + block


def _name_points(figure: Any, axes: Any, results: list[dict], kinds: list[str]) -> None:
  """Writes each name where it covers no point and no other name, if there is such a place."""
  figure.canvas.draw()
  frame = axes.get_window_extent()
  taken = []  # the points with their intervals, and the names so far
  for r in results:
    ends = [(r["tokens_per_pass"], 100 * r[name]) for name in ("solved_low", "solved_high")]
    (x, low), (_, high) = axes.transData.transform(ends)
    taken.append(_box(x - 6, low - 2, x + 6, high + 2))
  for result in results:
    best = None
    for x, y in _PLACES:
      text = axes.annotate(
        _name(result),
        (result["tokens_per_pass"], 100 * result["solved"]),
        (x, y),
        textcoords="offset points",
        size=_FONT,
        ha="left" if x > 0 else "right",
        color=f"C{kinds.index(_kind(result['mode'])) % 10}",
      )
      box = text.get_window_extent()
      covered = sum(_overlap(box, other) for other in taken)
      outside = box.width * box.height - _overlap(box, frame)
      if best is None or covered + outside < best[0]:
        if best is not None:
          best[1].remove()
        best = (covered + outside, text, box)
      else:
        text.remove()
      if best[0] <= 0:
        break
    if best is not None:
      taken.append(best[2])


def _box(x0, y0, x1, y1):
  from matplotlib.transforms import Bbox

  return Bbox([[x0, y0], [x1, y1]])


def _overlap(a: Any, b: Any) -> float:
  """The area that two boxes share, in pixels."""
  width = min(a.x1, b.x1) - max(a.x0, b.x0)
  height = min(a.y1, b.y1) - max(a.y0, b.y0)
  return max(width, 0.0) * max(height, 0.0)
