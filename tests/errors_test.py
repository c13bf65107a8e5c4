"""What a message may hold that quotes a file of somebody else."""

import pytest

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
