"""Chat templates as programs of strangers: they end, say little, and reach nothing."""

import signal
import threading
import time

import pytest
from data_fixtures import BARE_TEMPLATE, make_tokenizer, message

from refine_jax.errors import UserError
from refine_jax.text import chat, template

TURNS = [message("user", "hello")]
ENDLESS = [
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
  "{% macro m(n) %}{% for i in range(99999) %}{{ m(n) }}{% endfor %}{% endmacro %}"
  "{% for i in range(99999) %}{% for j in range(99999) %}{{ i * j }}{% endfor %}{% endfor %}",
]


def in_a_thread(function):
  result = []

  def run():
    try:
      result.append(function())
    except UserError as error:
      result.append(error)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join(20)
  if isinstance(result[0], UserError):
    raise result[0]
  return result[0]


@pytest.mark.parametrize("where", [lambda function: function(), in_a_thread])
@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_without_an_end_is_ended(monkeypatch, text, where):
  monkeypatch.setattr(template, "SECONDS", 0.2)
  tokenizer, start = make_tokenizer(text), time.monotonic()
  with pytest.raises(UserError, match="template of tiny-tokenizer runs for more than"):
    where(lambda: chat.encode_prompt(tokenizer, "hello"))
  assert time.monotonic() - start < 10
  # What follows is not ended by the same clock.
  assert where(lambda: template.render(make_tokenizer(BARE_TEMPLATE), TURNS)) == "hello"
  time.sleep(0.3)


def test_endless_for_some_conversations_is_the_users_error_and_not_a_bad_row(monkeypatch):
  monkeypatch.setattr(template, "SECONDS", 0.2)
  text = "{% if messages[0].content == 'go' %}" + ENDLESS[0] + "{% endif %}a"
  chat.check_tokenizer(make_tokenizer(text))
  with pytest.raises(UserError, match="runs for more than"):
    chat.prompt_text(make_tokenizer(text), "go")


def test_an_alarm_of_somebody_else_still_rings():
  rung = []
  before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
  try:
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    template.render(make_tokenizer(), TURNS)
    assert signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
    time.sleep(0.3)
    assert rung
  finally:
    signal.signal(signal.SIGALRM, before)


def test_output_has_a_bound(monkeypatch):
  monkeypatch.setattr(template, "LONGEST", 1000)
  assert len(template.render(make_tokenizer("{{ 'a' * 1000 }}"), TURNS)) == 1000
  with pytest.raises(template.Refused, match="more than 1000 characters"):
    template.render(make_tokenizer("{{ 'a' * 1001 }}"), TURNS)
  with pytest.raises(chat.BadExample, match="more than 1000 characters"):
    chat.prompt_text(make_tokenizer("{{ 'a' * 1001 }}"), TURNS)


@pytest.mark.parametrize(
  "text",
  [
    "{{ raise_exception('x' * 1000000) }}",
    "{% for " + "x" * 10_000 + " %}",
    "{{ 'a' | " + "f" * 10_000 + " }}",
    "{{ messages[0][0] + 'a' * 10000 + 1 }}",
  ],
)
def test_what_is_printed_of_a_template_is_cut(text):
  with pytest.raises(UserError) as raised:
    chat.encode_prompt(make_tokenizer(text), "hello")
  assert len(str(raised.value)) < 500


FAILING = [
  "{{ 1 / 0 }}",
  "{{ messages[7].content.a.b }}",
  "{{ 'a' + 1 }}",
  "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
  "{{ range(10**9) }}",
  "{% include 'file' %}",
  "{% set x = namespace() %}{{ x.y.z }}",
  "{{ '%d' | format('a') }}",
  "{{ ((" * 200,
  "(" * 10 + "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
  "{{ 2 ** 99999 }}",
  "{{ '\ud800' }}",
]


@pytest.mark.parametrize("text", FAILING)
def test_whatever_a_template_raises_is_one_line(text):
  with pytest.raises(UserError) as raised:
    chat.encode_prompt(make_tokenizer(text), "hello")
  assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
  "expression",
  [
    "''.__class__.__mro__[1].__subclasses__()",
    "cycler.__init__.__globals__.os.system('touch {}')",
    "lipsum.__globals__['os'].system('touch {}')",
    "self.__init__.__globals__.__builtins__.open('{}', 'w')",
    "messages.append(1)",
    "raise_exception.__globals__['sys'].modules['os'].system('touch {}')",
  ],
)
def test_a_template_runs_no_code_and_changes_nothing(tmp_path, expression):
  place = tmp_path / "made"
  turns = [message("user", "hello")]
  try:
    text = template.render(make_tokenizer("{{ " + expression.format(place) + " }}"), turns)
    assert "class" not in text
  except template.Refused:
    pass
  assert not place.exists() and turns == [message("user", "hello")]
