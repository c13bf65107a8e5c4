"""What a message may hold that quotes a file of somebody else."""

import io

import pytest

from refine_jax import cli, quoting
from refine_jax.errors import UserError


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x07", "\u202e", "\ud800", "\x00", "\x9b31m"])
def test_characters_that_a_terminal_acts_on_are_shown_as_escapes(hostile):
  message = str(UserError(f"a.json names {hostile}x"))
  assert message == f"a.json names {ascii(hostile)[1:-1]}x" and message.isprintable()


def test_text_of_other_scripts_and_lines_stays_readable():
  assert str(UserError("Größe ß 漢字\n  of\tx")) == "Größe ß 漢字 of x"


def test_long_words_and_long_messages_are_cut_with_their_ends_kept():
  path = "/" + "/".join(["folder"] * 50)
  message = str(UserError(f"{path}/{'n' * 5000} is no file; " + "many words " * 2000 + "mend it."))
  assert len(message) < 4100 and message.endswith("mend it.")
  assert "characters]" in message and message.startswith("/folder/folder")
  assert str(UserError(f"{path} is no file.")) == f"{path} is no file."


def test_values_are_shown_short_whatever_they_are():
  loop = []
  loop.append(loop)
  deep = [[[[[[["x"]]]]]]]
  for value in ("x" * 10**6, [0] * 10**6, {str(i): i for i in range(10**5)}, loop, deep, 10**5000):
    assert 0 < len(quoting.shown(value)) < 300
  assert quoting.shown(("a", 1.5, None)) == "('a', 1.5, None)"
  assert quoting.shown(-(10**5000)) == f"an integer of {(10**5000).bit_length()} bits"


def test_many_names_are_some_and_how_many_more():
  assert quoting.some([]) == "" and quoting.some(["a", "b"]) == "a, b"
  assert quoting.some(list("abcdefg")) == "a, b, c, d and 3 more"


@pytest.mark.parametrize(
  "error, said",
  [
    (OSError(28, "No space left on device"), "No space left on device"),
    (FileNotFoundError(2, "No such file", "a/b"), "No such file: a/b"),
    (KeyError("meta"), "KeyError: 'meta'"),
    (StopIteration(), "StopIteration"),
    (ValueError("one of:\n(1) a file\n(2) a name"), "one of: (1) a file (2) a name"),
    (ValueError("\n\n  it is\tno number\nmore"), "it is no number"),
    (RuntimeError("x failed [tensorstore_spec={'driver': 'zarr'}]"), "x failed"),
  ],
)
def test_what_a_library_says_is_one_line(error, said):
  assert quoting.reason(error) == said


def test_a_long_reason_keeps_its_two_ends():
  said = quoting.reason(ValueError("it began; " + "through layers; " * 999 + "the cause"))
  assert len(said) == quoting.LONGEST
  assert said.startswith("it began") and said.endswith("the cause") and " ... " in said


def test_what_a_terminal_cannot_show_ends_no_program(monkeypatch):
  for encoding, shown in (("utf-8", b"\\ud800 \xc3\xa9\n"), ("ascii", b"\\ud800 \\xe9\n")):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    with pytest.raises(SystemExit) as end:
      cli.entry_point(lambda: print("\ud800 \xe9"))()
    assert not end.value.code and stdout.buffer.getvalue() == shown
