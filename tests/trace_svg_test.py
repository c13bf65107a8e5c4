"""The SVG of an answer that grows pass by pass: what each of its frames shows."""

import re
import xml.etree.ElementTree as ET

import pytest

import refine_jax
from refine_jax.decoding import trace_svg
from refine_jax.decoding.result import Generation, Pass, Trace

NAME = "{http://www.w3.org/2000/svg}"
PIECES = {1: "a<", 2: "b\n", 3: " c", 4: "世", 5: "x" * 80}
# Three passes: 1 and 2 are added, then 3 after a wrong 4, then the last two.
PASSES = [
  Pass(0, [1, 2, 4], [1.0] * 3, 2),
  Pass(2, [3, 4], [1.0] * 2, 1),
  Pass(3, [4, 5], [1.0] * 2, 2),
]


def generation(**changes):
  fields = {
    "prompts": [[7]],
    "tokens": [[1, 2, 3, 4, 5]],
    "texts": ["ab"],
    "passes": [3],
    "stopped": [True],
    "accepted": [1.0],
    "prefill_seconds": 0.0,
    "decode_seconds": 1.0,
    "compile_seconds": 0.0,
    "trace": Trace([PASSES], ["why & how?"], PIECES),
  }
  return Generation(**(fields | changes))


@pytest.fixture(scope="module")
def frames():
  """Each frame's texts by style, in reading order, labels among them."""
  root = ET.fromstring(trace_svg.svg(generation()))
  return [
    [(t.get("class"), t.text) for t in group.iter(f"{NAME}text")] for group in root.iter(f"{NAME}g")
  ]


def said(frame, style, part=0):
  """Texts of a style: of the answer that grows by passes (0), or by tokens (1)."""
  labels = [i for i, (kind, _) in enumerate(frame) if kind == "label"]
  section = frame[labels[part] + 1 : labels[part + 1] if part == 0 else None]
  return "".join(text for kind, text in section if (kind or "") == style)


def test_each_frame_shows_what_its_pass_added_and_what_it_guessed(frames):
  assert len(frames) == 4  # a pass each, and the end
  assert [said(f, "new") for f in frames[:3]] == ["a<b↵", " c", "世" + "x" * 80]
  assert [said(f, "draft") for f in frames[:3]] == ["世", "世", ""]
  assert [said(f, "") for f in frames] == ["", "a<b↵", "a<b↵ c", "a<b↵ c世" + "x" * 80]
  assert [f[0][1] for f in frames] == [
    "pass 1: 2 of 5 tokens",
    "pass 2: 3 of 5 tokens",
    "pass 3: 5 of 5 tokens",
    "3 passes: 5 of 5 tokens",
  ]


def test_what_is_predicted_behind_the_end_is_left_out():
  passes = [Pass(0, [1, 3, 5, 4, 5], [1.0] * 5, 1), Pass(1, [2, 5, 5], [1.0] * 3, 2)]
  trace = Trace([passes], ["why?"], PIECES | {5: "<end>"})
  text = trace_svg.svg(generation(tokens=[[1, 2, 5]], passes=[2], trace=trace))
  root = ET.fromstring(text)
  first, second, _ = root.iter(f"{NAME}g")
  drafts = [
    [t.text for t in f.iter(f"{NAME}text") if t.get("class") == "draft"] for f in (first, second)
  ]
  assert drafts == [[" c<end>"], []]


def test_the_other_answer_grows_by_a_token_a_pass(frames):
  together = [said(f, "", 1) + said(f, "new", 1) for f in frames]
  assert together == ["a<", "a<b↵", "a<b↵ c", "a<b↵ c"]


def test_lines_break_at_newlines_and_at_the_edge():
  text = trace_svg.svg(generation())
  rows = sorted({float(y) for y in re.findall(r'<text class=""[^>]* y="([\d.]+)"', text)})
  assert len(rows) >= 4
  widths = [float(w) for w in re.findall(r'textLength="([\d.]+)"', text)]
  assert max(widths) <= 72 * 8.4 + 1e-6
  assert 2 * 8.4 in widths  # the wide character


def test_one_frame_at_a_time_is_visible():
  """At each moment of the loop one frame's delay is up to date, and the last stays longest."""
  text = trace_svg.svg(generation(), seconds=2)
  delays = [float(d) for d in re.findall(r"animation-delay:(-?[\d.]+)s", text)]
  (total,) = map(float, re.findall(r"\.f \{ animation: f ([\d.]+)s", text))
  shares = [float(s) for s in re.findall(r"([\d.]+)% \{ visibility: hidden", text)]
  lengths = [shares[0]] * (len(delays) - 1) + [shares[1]]
  for moment in [x + 0.5 for x in range(int(total))]:
    shown = [
      i
      for i, (delay, share) in enumerate(zip(delays, lengths, strict=True))
      if (moment - delay) % total < share / 100 * total
    ]
    assert shown == [min(int(moment // 2), len(delays) - 1)]


def test_an_answer_without_a_trace_is_refused():
  with pytest.raises(refine_jax.UserError, match="trace=True"):
    trace_svg.svg(generation(trace=None))
