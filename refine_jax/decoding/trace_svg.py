"""An answer that grows pass by pass, as an SVG that moves by itself: for a page or a README.

Beside it grows the same answer at one token a pass. No scripts; readers who want no motion, and
programs that know none, see the end.
"""

import html
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from refine_jax import files
from refine_jax.decoding.trace_html import refuse_existing, visible_character
from refine_jax.errors import UserError

if TYPE_CHECKING:
  from refine_jax.decoding.result import Generation

_COLUMNS = 72
_LINE, _WIDTH, _MARGIN = 22, 8.4, 18  # pixels: a line, a column, the edge
_HELD = 4  # the last frame stays for so many
_STYLE = """
svg { --page: #ffffff; --ink: #1b1b1b; --faint: #6a7078; --new: #bfe8cd; --draft: #e7e9ec; }
@media (prefers-color-scheme: dark) { svg {
  --page: #16181d; --ink: #e6e6e6; --faint: #9aa0a6; --new: #1d5131; --draft: #343941; } }
.page { fill: var(--page); }
text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: var(--ink); white-space: pre; }
.label, text.draft { fill: var(--faint); }
.label { font-family: system-ui, sans-serif; }
rect.new { fill: var(--new); } rect.draft { fill: var(--draft); }
.f { visibility: hidden; } .last { visibility: visible; }
"""


def svg(generation: "Generation", row: int = 0, *, seconds: float = 1.0) -> str:
  """The picture of one answer.

  Args:
    generation: with a trace.
    row: which answer.
    seconds: how long a pass is shown.

  Raises:
    UserError: the passes were not traced.
  """
  trace = generation.trace
  if trace is None:
    raise UserError("The passes were not kept; call generate(.., trace=True).")
  passes, tokens = trace.rows[row], generation.tokens[row]
  pieces = trace.pieces
  question = _lines([(trace.prompts[row], "")])
  frames, done = [], 0
  for number, seen in enumerate(passes, 1):
    done = seen.start + seen.committed
    drafts = _guesses(seen.tokens[seen.committed :], tokens, done, generation.stopped[row])
    parts = [
      (_joined(tokens[: seen.start], pieces), ""),
      (_joined(tokens[seen.start : done], pieces), "new"),
      (_joined(drafts, pieces), "draft"),
    ]
    alone = [(_joined(tokens[: number - 1], pieces), "")]
    alone.append((_joined(tokens[number - 1 : number], pieces), "new"))
    frames.append((f"pass {number}", done, _lines(parts), min(number, len(tokens)), _lines(alone)))
  frames.append(
    (f"{len(passes)} passes", done, _lines([(_joined(tokens, pieces), "")]), *frames[-1][3:])
  )
  most = max(len(lines) for _, _, lines, _, _ in frames)
  least = max(len(lines) for *_, lines in frames)
  first = len(question) + 2  # the line under the question and a label
  second = first + most + 1.5
  height = _MARGIN * 2 + _LINE * (second + least + 1.2)
  width = _MARGIN * 2 + _WIDTH * _COLUMNS
  slots = len(frames) - 1 + _HELD
  body = [_text(question, 1.0)]
  for i, (name, done, lines, alone_done, alone) in enumerate(frames):
    last = i == len(frames) - 1
    delay = (i - slots) * seconds
    body.append(
      f'<g class="f{" last" if last else ""}" style="animation-delay:{delay:g}s">'
      f"{_label(f'{name}: {done} of {len(tokens)} tokens', first - 0.6)}{_text(lines, first + 0.4)}"
      f"{_label(f'one token a pass: {alone_done} of {len(tokens)}', second - 0.6)}"
      f"{_text(alone, second + 0.4)}</g>"
    )
  body.append(_legend(second + least + 0.9))
  moves = (
    f".f {{ animation: f {slots * seconds:g}s step-end infinite; }}"
    f" .last {{ animation-name: last; }}"
    f"@keyframes f {{ 0% {{ visibility: visible; }} {100 / slots:.3f}% {{ visibility: hidden; }} }}"
    f"@keyframes last {{ 0% {{ visibility: visible; }} {100 * _HELD / slots:.3f}%"
    " { visibility: hidden; } }"
    "@media (prefers-reduced-motion: reduce) { .f, .last { animation: none; } }"
  )
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
    f' viewBox="0 0 {width:g} {height:g}" role="img"><title>{len(tokens)} tokens in'
    f" {len(passes)} passes</title><style>{_STYLE}{moves}</style>"
    f'<rect class="page" width="100%" height="100%" rx="8"/>{"".join(body)}</svg>\n'
  )


def write(generation: "Generation", path: str | Path, row: int = 0) -> None:
  """Writes `svg` as a new file.

  Raises:
    UserError: the file is there already, or cannot be written; the passes were not traced.
  """
  path, text = refuse_existing(path), svg(generation, row)
  with files.new_file(path) as unfinished:
    unfinished.write_text(text, encoding="utf-8")


def _guesses(drafts, tokens, done, stopped) -> list[int]:
  """The drafts, without what is predicted behind an end, which is no part of any answer."""
  if done == len(tokens):
    return []
  end = tokens[-1]
  return drafts[: drafts.index(end) + 1] if stopped and end in drafts else drafts


def _joined(tokens, pieces) -> str:
  return "".join(pieces.get(t, str(t)) for t in tokens)


def _columns(character: str) -> int:
  return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _lines(parts: list[tuple[str, str]]) -> list[list[tuple[int, str, int, str]]]:
  """Texts with their styles, one after the other, as lines of runs (column, text, width, style)."""
  lines, column = [[]], 0
  for c, style in ((c, style) for text, style in parts for c in text):
    shown = visible_character(c)
    wide = sum(map(_columns, shown))
    if column + wide > _COLUMNS:
      lines.append([])
      column = 0
    runs = lines[-1]
    if runs and runs[-1][3] == style:
      start, text, before, _ = runs.pop()
      runs.append((start, text + shown, before + wide, style))
    else:
      runs.append((column, shown, wide, style))
    column += wide
    if c == "\n":
      lines.append([])
      column = 0
  return lines


def _text(lines, top: float) -> str:
  out = []
  for i, runs in enumerate(lines):
    y = _MARGIN + _LINE * (top + i)
    for column, text, wide, style in runs:
      x, length = _MARGIN + _WIDTH * column, _WIDTH * wide
      if style:
        out.append(
          f'<rect class="{style}" x="{x:g}" y="{y - 15:g}" width="{length:g}" height="20" rx="3"/>'
        )
      out.append(
        f'<text class="{style}" x="{x:g}" y="{y:g}" textLength="{length:g}"'
        f' lengthAdjust="spacingAndGlyphs">{html.escape(text)}</text>'
      )
  return "".join(out)


def _label(text: str, top: float, x: float = _MARGIN) -> str:
  y = _MARGIN + _LINE * top
  return f'<text class="label" x="{x:g}" y="{y:g}">{html.escape(text)}</text>'


def _legend(top: float) -> str:
  y = _MARGIN + _LINE * top
  out, x = [], _MARGIN
  for style, meaning in (("new", "added by this pass"), ("draft", "predicted, not yet verified")):
    out.append(f'<rect class="{style}" x="{x:g}" y="{y - 12:g}" width="16" height="16" rx="3"/>')
    out.append(_label(meaning, top, x + 24))
    x += 190
  return "".join(out)
