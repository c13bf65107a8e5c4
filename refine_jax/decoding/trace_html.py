"""Answers as HTML: a row a pass, each token coloured by what the pass did with it.

No scripts and nothing from elsewhere: a page can be kept, mailed and opened offline.
"""

import html
from pathlib import Path
from typing import TYPE_CHECKING

from refine_jax import files
from refine_jax.errors import UserError

if TYPE_CHECKING:
  from refine_jax.decoding.result import Generation

_CONTEXT = 12  # committed tokens shown before the block
_STATES = {
  "new": "predicted by no pass before",
  "changed": "another token than the pass before",
  "kept": "the same token as the pass before",
  "committed": "part of the answer from here on",
}
# Jupyter, Colab and browsers name their dark themes differently; a background of its own keeps
# the text readable where none of these is told.
_DARK = """
--rj-page: #16181d; --rj-ink: #e6e6e6; --rj-faint: #9aa0a6; --rj-line: #3a3f47;
--rj-new: #1e3a5f; --rj-changed: #6b4410; --rj-kept: #3a3f47; --rj-committed: #1d5131;
--rj-edge: #5ecb8a;
"""
_STYLE = (
  """
.refine-jax {
  --rj-page: #ffffff; --rj-ink: #1b1b1b; --rj-faint: #666c73; --rj-line: #d5d9de;
  --rj-new: #d6e8ff; --rj-changed: #ffdfb0; --rj-kept: #e7e9ec; --rj-committed: #c9efd5;
  --rj-edge: #17803d;
  background: var(--rj-page); color: var(--rj-ink); padding: 0.7em 1em; border-radius: 6px;
  font: 14px/1.5 system-ui, sans-serif; text-align: left;
}
.refine-jax p { margin: 0.3em 0; }
.refine-jax details { border-top: 1px solid var(--rj-line); padding: 0.5em 0; }
.refine-jax summary { cursor: pointer; font-weight: 600; }
.refine-jax .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.4em 0; }
.refine-jax .faint, .refine-jax th { color: var(--rj-faint); font-weight: normal; }
.refine-jax table { border-collapse: collapse; width: 100%; font: inherit; }
.refine-jax tr { background: none; }
.refine-jax th, .refine-jax td {
  padding: 2px 8px 2px 0; vertical-align: top; text-align: left; color: var(--rj-ink);
  border-bottom: 1px solid var(--rj-line);
}
.refine-jax th { text-align: right; white-space: nowrap; color: var(--rj-faint); }
.refine-jax th:last-child { text-align: left; }
.refine-jax td {
  width: 100%; font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.refine-jax .t { border-radius: 3px; margin-right: 1px; padding: 0 1px; unicode-bidi: isolate; }
.refine-jax .t:hover { outline: 1px solid var(--rj-ink); }
.refine-jax .new { background: var(--rj-new); }
.refine-jax .changed { background: var(--rj-changed); font-style: italic; }
.refine-jax .kept { background: var(--rj-kept); }
.refine-jax .committed {
  background: var(--rj-committed); box-shadow: inset 0 -2px var(--rj-edge);
}
@media (prefers-color-scheme: dark) { .refine-jax {"""
  + _DARK
  + """} }
html[theme=dark] .refine-jax, body[data-jp-theme-light=false] .refine-jax, .vscode-dark .refine-jax
{"""
  + _DARK
  + "}\n"
)


def fragment(generation: "Generation", *, numbers: bool = True) -> str:
  """HTML to put into a page or a notebook: the passes where they were traced, or the answers.

  Args:
    numbers: whether what the call cost stands above them.
  """
  rows = range(len(generation.tokens))
  trace = generation.trace
  legend = (
    ""
    if trace is None
    else "<p>"
    + " ".join(
      f'<span class="t {name}" title="{meaning}">{name}</span>' for name, meaning in _STATES.items()
    )
    + ' <span class="faint">a row a pass; hover for probabilities; ↵ is a newline</span></p>'
  )
  return (
    f'<div class="refine-jax"><style>{_STYLE}</style>'
    + (f"<p>{_numbers(generation)}</p>" if numbers else "")
    + legend
    + "".join(_answer(generation, row, "open" if row == 0 else "") for row in rows)
    + "</div>"
  )


def page(generation: "Generation", title: str = "Refinement", *, numbers: bool = True) -> str:
  """A whole document with a `fragment`."""
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width"><meta name="color-scheme" '
    f'content="light dark"><title>{html.escape(title)}</title></head>\n<body>'
    f"{fragment(generation, numbers=numbers)}</body></html>\n"
  )


def refuse_existing(path: str | Path) -> Path:
  """The path, in a directory that is made where it is missing.

  Raises:
    UserError: there is something already.
  """
  path = Path(path)
  if path.exists():
    raise UserError(f"{path} is there already; name a new file.")
  with files.write_errors(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
  return path


def write(generation: "Generation", path: str | Path, title: str = "Refinement") -> None:
  """Writes `page` as a new file.

  Raises:
    UserError: the file is there already, or cannot be written.
  """
  path = refuse_existing(path)
  with files.new_file(path) as unfinished:
    unfinished.write_text(page(generation, title), encoding="utf-8")


def _numbers(generation) -> str:
  cost, *offsets = html.escape(generation.numbers).split("\n")
  return f'{cost}<br><span class="faint">{"<br>".join(offsets)}</span>'


def _answer(generation, row, opened) -> str:
  tokens, passes = generation.tokens[row], generation.passes[row]
  text = str(tokens) if generation.texts is None else generation.texts[row]
  end = "stopped" if generation.stopped[row] else "at its limit"
  trace = generation.trace
  asked = body = ""
  if trace is not None:
    asked = f'<div class="text faint">{_escape_lines(trace.prompts[row])}</div>'
    body = _passes(trace.rows[row], tokens, trace.pieces)
  return (
    f"<details {opened}><summary>answer {row + 1}: {len(tokens)} tokens in {passes} passes,"
    f" {len(tokens) / max(passes, 1):.2f} a pass, {end}</summary>{asked}"
    f'<div class="text">{_escape_lines(text)}</div>{body}</details>'
  )


def _passes(passes, tokens, pieces) -> str:
  before, lines = {}, []
  for number, seen in enumerate(passes, 1):
    first = max(seen.start - _CONTEXT, 0)
    past = ("… " if first else "") + "".join(
      _escape(pieces.get(t, str(t))) for t in tokens[first : seen.start]
    )
    # A line may break between tokens, rather than inside one.
    spans = "<wbr>".join(
      _span(seen, offset, before.get(seen.start + offset), pieces)
      for offset in range(len(seen.tokens))
    )
    lines.append(
      f"<tr><th>{number}</th><th>{seen.committed}</th>"
      f'<td><span class="faint">{past}</span>{spans}</td></tr>'
    )
    before = dict(enumerate(seen.tokens, seen.start))
  head = "<tr><th>pass</th><th>commits</th><th>tokens</th></tr>"
  return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def _span(seen, offset, earlier, pieces) -> str:
  token = seen.tokens[offset]
  state = "new" if earlier is None else "kept" if earlier == token else "changed"
  committed = offset < seen.committed
  words = f"probability {seen.probabilities[offset]:.3f}, token {token}, {state}"
  if state == "changed":
    words += f" from {_visible(pieces[earlier])} ({earlier})"
  if committed:
    words += ", committed"
  return (
    f'<span class="t {"committed" if committed else state}" title="{html.escape(words)}">'
    f"{_escape(pieces[token])}</span>"
  )


def _escape(text: str) -> str:
  """HTML of a token, with its whitespace visible."""
  return html.escape(_visible(text))


def _escape_lines(text: str) -> str:
  """HTML of a whole text, which keeps its lines and tabs."""
  return html.escape("".join(c if c in "\n\t" else visible_character(c) for c in text))


def _visible(text: str) -> str:
  if not text.strip(" "):
    return "·" * len(text) or "∅"
  return "".join(map(visible_character, text))


def visible_character(c: str) -> str:
  known = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
  if c in known or c.isprintable():
    return known.get(c, c)
  # Control pictures for control characters; marks that would turn or hide text by number.
  return chr(0x2400 + ord(c)) if ord(c) < 32 else f"‹{ord(c):04X}›"
