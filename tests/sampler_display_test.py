"""The trace of the passes, the HTML made of it, and streamed text."""

import html.parser
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sampler_fixtures
import scipy.special

import refine_jax
from refine_jax.decoding import trace_html
from refine_jax.decoding.result import Generation, Pass, Trace, token_texts

MODES = ("exact", "fixed", "threshold", "ar")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return sampler_fixtures.text_model_directory(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def model(directory):
  return refine_jax.load(directory)


PROMPTS = ["what is two", "a b c d e f"]


@pytest.mark.parametrize("mode", MODES)
def test_a_trace_changes_nothing_and_tells_the_answer(model, mode):
  options = {"mode": mode, "block_size": 4, "max_new_tokens": 13, "tau": 0.3}
  plain = refine_jax.generate(model, PROMPTS, **options)
  traced = refine_jax.generate(model, PROMPTS, trace=True, **options)
  assert plain.trace is None
  assert (traced.tokens, traced.passes) == (plain.tokens, plain.passes)
  assert traced.accepted == plain.accepted
  for tokens, passes, count in zip(traced.tokens, traced.trace.rows, traced.passes, strict=True):
    assert len(passes) == count
    committed = [t for seen in passes for t in seen.tokens[: seen.committed]]
    assert committed == tokens
    done = 0
    for seen in passes:
      assert seen.start == done
      assert seen.start + len(seen.tokens) <= 13
      assert len(seen.probabilities) == len(seen.tokens)
      done += seen.committed


def test_traced_probabilities_are_the_models(model):
  """Committed tokens, against a dense forward pass over the text before each."""
  out = refine_jax.generate(model, [[5, 6, 7]], block_size=4, max_new_tokens=9, trace=True)
  text = np.array([[5, 6, 7] + out.tokens[0]])
  want = scipy.special.softmax(np.asarray(model(text))[0], axis=-1)
  for seen in out.trace.rows[0]:
    for offset in range(seen.committed):
      place = 3 + seen.start + offset
      np.testing.assert_allclose(
        seen.probabilities[offset], want[place - 1, text[0, place]], rtol=1e-4
      )


def test_a_temperature_shows_in_the_probabilities(model):
  options = {"block_size": 1, "max_new_tokens": 1, "trace": True, "temperature": 3.0, "top_k": 2}
  out = refine_jax.generate(model, [[5, 6, 7]], **options)
  logits = np.sort(np.asarray(model(np.array([[5, 6, 7]])))[0, -1])[-2:]
  (seen,) = out.trace.rows[0]
  two = scipy.special.softmax(logits / 3)
  assert np.isclose(seen.probabilities[0], two, rtol=1e-4).any()


def test_token_texts_join_to_the_text(model):
  text = "the quick é世 brown\n  fox"
  ids = model.tokenizer.encode(text, add_special_tokens=False)
  pieces = token_texts(model.tokenizer, set(ids))
  ascii_only = [pieces[i] for i in ids if "\ufffd" not in pieces[i]]
  assert "".join(ascii_only) == text.replace("é世", "")
  assert token_texts(None, [3]) == {3: " 3"}


class Reader(html.parser.HTMLParser):
  """Fails on tags that do not nest, and keeps the coloured tokens of each table row."""

  def __init__(self, text):
    super().__init__()
    self.open, self.rows, self.tags = [], [], set()
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    if tag not in ("meta", "br", "wbr"):
      self.open.append((tag, dict(attributes)))
    if tag == "tr":
      self.rows.append([])

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    if self.open and (self.open[-1][1].get("class") or "").startswith("t ") and self.rows:
      self.rows[-1].append((data, self.open[-1][1]["class"][2:], self.open[-1][1]["title"]))


def small_generation():
  pieces = {1: "<b>", 2: "\n", 3: '"&', 4: "   ", 5: " x", 6: "\u202eevil\x00"}
  passes = [
    Pass(0, [1, 2, 3], [0.5, 0.25, 0.125], 1),
    Pass(1, [2, 4, 5], [0.9, 0.8, 0.7], 2),
    Pass(3, [5, 6], [1.0, 0.1], 2),
  ]
  trace = Trace([passes], ["<script>alert(1)</script>"], pieces)
  texts = ['<b>\n   " x</b>']
  numbers = ([3], [True], [1.0, 0.5, 0.0], 0.1, 0.2, 0.0)
  return Generation([[9]], [[1, 2, 4, 5, 6]], texts, *numbers, trace)


def test_each_token_has_its_colour_and_probability():
  rows = [row for row in Reader(trace_html.page(small_generation())).rows if row]
  assert [[state for _, state, _ in row] for row in rows] == [
    ["committed", "new", "new"],
    ["committed", "committed", "new"],
    ["committed", "committed"],
  ]
  assert [text for text, _, _ in rows[0]] == ["<b>", "↵", '"&']
  assert rows[1][1][0] == "···"
  assert "0.800" in rows[1][1][2] and 'changed from "&' in rows[1][1][2]
  assert "kept, committed" in rows[1][0][2]
  assert rows[2][1][0] == "‹202E›evil␀"


def test_changed_and_kept_are_against_the_pass_before():
  out = small_generation()
  passes = [Pass(0, [1, 2], [1.0, 1.0], 0), Pass(0, [1, 3], [1.0, 1.0], 0)]
  out.trace.rows[0][:] = passes
  rows = [row for row in Reader(trace_html.page(out)).rows if row]
  assert [[state for _, state, _ in row] for row in rows] == [["new", "new"], ["kept", "changed"]]


def test_the_page_is_escaped_and_needs_nothing_else():
  page = trace_html.page(small_generation(), title="</title><script>")
  tags = Reader(page).tags
  assert not tags & {"script", "b", "link", "img", "iframe"}
  assert not re.search(r"https?:|url\(|@import|\u202e|\x00", page)
  for state in ("new", "changed", "kept", "committed"):
    assert f".{state} {{" in page and f'class="t {state}"' in page
  assert "prefers-color-scheme: dark" in page


def test_texts_keep_their_lines_and_show_what_would_turn_them():
  out = small_generation()
  out.texts[0] = "one\n\n\ttwo <b>\u202e"
  assert '<div class="text">one\n\n\ttwo &lt;b&gt;‹202E›</div>' in trace_html.page(out)


@pytest.mark.slow
def test_a_notebook_shows_traced_and_plain_results(model):
  traced = refine_jax.generate(model, PROMPTS, max_new_tokens=5, trace=True)
  shown = Reader(traced._repr_html_())
  assert sum(map(bool, shown.rows)) == sum(traced.passes)
  plain = refine_jax.generate(model, PROMPTS, max_new_tokens=5)
  assert "table" not in Reader(plain._repr_html_()).tags
  for line in plain.numbers.splitlines():
    assert line in plain._repr_html_()
  ids = refine_jax.generate(sampler_fixtures.copier_model(), [[1]], max_new_tokens=3, trace=True)
  assert [r[0][0] for r in Reader(ids._repr_html_()).rows if r][0] == " 2"
  assert refine_jax.generate(model, [], trace=True)._repr_html_()


def test_a_page_is_written_once(tmp_path):
  place = tmp_path / "new" / "out.html"
  trace_html.write(small_generation(), place)
  before = place.read_bytes()
  assert before.startswith(b"<!doctype html>")
  with pytest.raises(refine_jax.UserError, match="there already"):
    trace_html.write(small_generation(), place)
  assert place.read_bytes() == before and [p.name for p in place.parent.iterdir()] == ["out.html"]


@pytest.mark.parametrize("stop", [(), ("e",), ("th", "zz")])
@pytest.mark.parametrize("passes", [True, 3])
def test_pieces_join_to_the_text(model, stop, passes):
  options = {"max_new_tokens": 12, "block_size": 4, "stop": stop}
  whole = refine_jax.generate(model, PROMPTS, **options)
  stream = refine_jax.generate(model, PROMPTS, stream=passes, **options)
  pieces = list(stream)
  assert ["".join(row) for row in zip(*pieces, strict=True)] == whole.texts
  assert stream.result.tokens == whole.tokens
  assert len(pieces) >= max(stream.result.passes) / passes


def test_what_may_become_a_stop_string_waits():
  """The copier says the letters in turn; its stop string comes over two passes."""
  letters = Letters()
  model = sampler_fixtures.copier_model(letters, 27)
  options = {"block_size": 1, "max_new_tokens": 9, "stop": ["ef", "dx"], "stream": True}
  pieces = [piece for (piece,) in refine_jax.generate(model, [[0]], **options)]
  assert pieces == ["b", "c", "", "d", ""]
  options["stop"] = ["jz"]
  assert "".join(p for (p,) in refine_jax.generate(model, [[0]], **options)) == "bcdefghij"


class Letters:
  """A tokenizer, as far as decoding uses one."""

  added_tokens_decoder = {}

  def decode(self, ids, **_):
    return "".join(map(self.convert_ids_to_tokens, ids))

  def convert_ids_to_tokens(self, token):
    return chr(97 + token)


def test_half_a_character_waits_for_the_other(model):
  class Bytes(Letters):
    def decode(self, ids, **_):
      return bytes("é世é".encode()[i - 1] for i in ids).decode(errors="replace")

  model = sampler_fixtures.copier_model(Bytes(), 27)
  stream = refine_jax.generate(model, [[0]], block_size=1, max_new_tokens=7, stream=True)
  assert [piece for (piece,) in stream] == ["", "é", "", "", "世", "", "é"]


def test_streams_and_stops_need_their_means(model):
  with pytest.raises(refine_jax.UserError, match="no tokenizer"):
    refine_jax.generate(sampler_fixtures.copier_model(), [[1]], stream=True)
  with pytest.raises(refine_jax.UserError, match="empty"):
    refine_jax.generate(model, PROMPTS, stop=["x", ""])


def sample(directory, *arguments):
  script = Path(__file__).parents[1] / "scripts" / "sample.py"
  return subprocess.run(
    [sys.executable, script, f"--model={directory}", "--max_new_tokens=5", *arguments],
    capture_output=True,
    text=True,
    input="",
    check=False,
  )


def test_the_script_writes_the_page_and_refuses_to_overwrite(directory, tmp_path):
  place = tmp_path / "out.html"
  result = sample(directory, "--prompt=what is", f"--html={place}")
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip("\n") and Reader(place.read_text(encoding="utf-8")).rows
  again = sample(directory, "--prompt=what is", f"--html={place}")
  assert again.returncode == 1 and again.stdout == ""
  assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
