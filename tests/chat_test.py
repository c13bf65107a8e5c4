"""Prompt and response to ids: templates, the boundary, <think>, EOS, truncation."""

import data_fixtures
import pytest
from data_fixtures import BARE_TEMPLATE, EOS, THINK_TEMPLATE, make_tokenizer, message

from refine_jax.data import tokenize
from refine_jax.errors import UserError
from refine_jax.text import chat


def response_text(response, template=data_fixtures.CHAT_TEMPLATE):
  return chat.example_texts(make_tokenizer(template), "a", response).response


def encode_response(tokenizer, response):
  text = chat.example_texts(tokenizer, "a", response).response
  return chat.with_eos(chat.encode(tokenizer, [text])[0], tokenizer.eos_token_id)


def test_a_string_is_one_user_message():
  tokenizer = make_tokenizer()
  as_string = chat.encode_prompt(tokenizer, "what is two")
  assert as_string == chat.encode_prompt(tokenizer, [message("user", "what is two")])
  expected = "<|start|>user\nwhat is two<|end|>\n<|start|>assistant\n"
  assert tokenizer.decode(as_string) == expected


def test_several_turns_and_a_system_message_are_kept_in_order():
  tokenizer = make_tokenizer()
  turns = [("system", "be brief"), ("user", "hello"), ("assistant", "world"), ("user", "a")]
  text = tokenizer.decode(chat.encode_prompt(tokenizer, [message(*turn) for turn in turns]))
  places = [text.index(f"<|start|>{role}\n{content}<|end|>") for role, content in turns]
  assert places == sorted(places)
  assert text.endswith("<|start|>assistant\n")


def test_beginning_of_sequence_comes_from_the_template_alone():
  """A tokenizer that adds one by itself would double it."""
  tokenizer = make_tokenizer("<|start|>" + BARE_TEMPLATE)
  tokenizer.bos_token = "<|start|>"
  tokenizer.add_bos_token = True
  ids = chat.encode_prompt(tokenizer, "hello")
  assert ids.count(tokenizer.bos_token_id) == 1


def test_boundary_is_the_prompts_own_length_where_a_merge_would_cross_it():
  tokenizer = make_tokenizer(BARE_TEMPLATE)
  prompt, response = "the answ", "er is four"
  joint = chat.encode(tokenizer, [prompt + response])[0]
  alone = chat.encode_prompt(tokenizer, prompt)
  assert joint[: len(alone)] != alone  # a merge does cross it
  dropped = {}
  ((_, prompt_ids, response_ids),) = tokenize._encode(
    tokenizer, [prompt], [response], data_fixtures.data_config(), dropped, noted={}
  )
  ids, boundary = tokenize.fit(prompt_ids, response_ids, data_fixtures.data_config())
  assert ids[:boundary] == alone
  assert tokenizer.decode(ids[boundary:]) == response + EOS


@pytest.mark.parametrize(
  "response, kept",
  [
    ("<think>\nwhy\n</think>\nfour", "why\n</think>\nfour"),
    ("\n<think>why</think>four", "why</think>four"),
    ("<think>\n\nwhy</think>", "\nwhy</think>"),
    ("why</think> and <think> again", "why</think> and <think> again"),
    ("  four", "  four"),
  ],
)
def test_a_leading_think_is_dropped_where_the_template_opened_it(response, kept):
  prompt = chat.prompt_text(make_tokenizer(THINK_TEMPLATE), "a")
  assert prompt.endswith("<think>\n")
  assert response_text(response, THINK_TEMPLATE) == kept


def test_think_is_kept_where_the_template_does_not_open_it():
  response = "<think>\nwhy\n</think>\nfour"
  assert response_text(response) == response


def test_line_break_after_think_stays_where_the_prompt_has_none():
  assert response_text("<think>\nwhy", "a<think>") == "\nwhy"


@pytest.mark.parametrize("ending", ["", EOS, EOS + "\n", EOS + EOS, f"{EOS}\n{EOS}\n"])
def test_one_eos_at_the_end_whatever_the_text_ends_in(ending):
  tokenizer = make_tokenizer()
  plain = chat.encode(tokenizer, ["it is four"])[0]
  result = encode_response(tokenizer, "it is four" + ending)
  assert result.count(tokenizer.eos_token_id) == 1
  assert result[: len(plain)] == plain and result[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("last", [[], [2], [2, 2]])
def test_ids_end_in_one_eos(last):
  assert chat.with_eos([7, 2, 8, *last], 2) == [7, 2, 8, 2]


def test_a_response_may_be_the_assistants_message():
  assert response_text([message("assistant", "four")]) == "four"


@pytest.mark.parametrize(
  "response, reason",
  [
    (None, "null"),
    ("", "empty target"),
    (" \n", "empty target"),
    (EOS, "empty target"),
    ([message("assistant", "a"), message("user", "b")], "target of several messages"),
    ([message("user", "a")], "target not the assistant's"),
    ([], "not a string or messages"),
    (4, "not a string or messages"),
    (b"four", "not a string or messages"),
    ([{"role": "assistant", "content": None}], "not a string or messages"),
  ],
)
def test_a_bad_response_has_its_reason(response, reason):
  with pytest.raises(chat.BadExample, match=f"^{reason}$"):
    response_text(response)


def test_response_of_a_think_alone_is_empty():
  with pytest.raises(chat.BadExample, match="empty target"):
    response_text("<think>\n", "a<think>\n")


def test_null_fields_of_messages_do_not_reach_the_template():
  """Parquet gives every message of a column all the fields that any of them has."""
  template = "{% for m in messages %}{{ m | length }}{% endfor %}"
  prompt = [message("user", "a") | {"name": None}]
  assert chat.prompt_text(make_tokenizer(template), prompt) == "2"


def test_a_conversation_that_the_template_refuses_is_a_bad_example():
  template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
  tokenizer = make_tokenizer(template)
  assert chat.prompt_text(tokenizer, "hello") == "a"
  with pytest.raises(chat.BadExample, match="refused by the chat template: no system"):
    chat.prompt_text(tokenizer, [message("system", "a")])


def test_missing_eos_template_and_broken_template_say_what_to_set():
  with pytest.raises(UserError, match="tiny-tokenizer has no EOS token; set eos_token"):
    chat.check_tokenizer(make_tokenizer(eos=None))
  without = make_tokenizer(chat_template=None)
  with pytest.raises(UserError, match="no chat template; set config.data.chat_template"):
    chat.check_tokenizer(without)
  with pytest.raises(UserError, match="no chat template; set config.data.chat_template"):
    chat.encode_prompt(without, "a")
  with pytest.raises(UserError, match="^config.data.chat_template cannot be used"):
    chat.check_tokenizer(without, "{% for %}")
  with pytest.raises(UserError, match="^The chat template of tiny-tokenizer cannot be used"):
    chat.check_tokenizer(make_tokenizer("{% for %}"), BARE_TEMPLATE)


def test_fallback_template_is_for_tokenizers_without_one():
  without, own = make_tokenizer(chat_template=None), make_tokenizer()
  assert without.decode(chat.encode_prompt(without, "hello", BARE_TEMPLATE)) == "hello"
  assert chat.encode_prompt(own, "hello", BARE_TEMPLATE) == chat.encode_prompt(own, "hello")


@pytest.mark.parametrize("prompt", [None, 3, [], [{"role": "user"}]])
def test_what_is_no_prompt_is_the_users_error(prompt):
  with pytest.raises(UserError, match="is no prompt"):
    chat.encode_prompt(make_tokenizer(), prompt)


def test_a_prompt_without_tokens_is_the_users_error():
  with pytest.raises(UserError, match="no tokens"):
    chat.encode_prompt(make_tokenizer(BARE_TEMPLATE), "")


def fit(prompt: int, response: int, max_length: int, truncation: str):
  """Prompt ids from 100, response ids from 200, the last of them EOS (999)."""
  ids = [*range(200, 200 + response - 1), 999]
  config = data_fixtures.data_config(max_length=max_length, truncation=truncation)
  return tokenize.fit(list(range(100, 100 + prompt)), ids, config)


@pytest.mark.parametrize("truncation", ["error", "left", "right"])
def test_what_fits_is_not_touched(truncation):
  assert fit(3, 4, 7, truncation) == ([100, 101, 102, 200, 201, 202, 999], 3)


def test_right_drops_the_end_and_its_eos():
  assert fit(3, 4, 6, "right") == ([100, 101, 102, 200, 201, 202], 3)


def test_right_drops_examples_without_a_response_token():
  assert fit(3, 4, 4, "right") == ([100, 101, 102, 200], 3)
  with pytest.raises(chat.BadExample, match="nothing left of the response"):
    fit(3, 4, 3, "right")


def test_left_keeps_the_end_and_the_boundary_where_it_was():
  assert fit(3, 4, 5, "left") == ([102, 200, 201, 202, 999], 1)


def test_left_into_the_response_keeps_one_token_to_predict_from():
  assert fit(3, 4, 4, "left") == ([200, 201, 202, 999], 1)
  assert fit(3, 4, 2, "left") == ([202, 999], 1)


def test_error_names_the_lengths():
  with pytest.raises(UserError, match="7 tokens are more than config.data.max_length=6"):
    fit(3, 4, 6, "error")


def test_an_empty_prompt_is_a_bad_example():
  with pytest.raises(chat.BadExample, match="empty prompt"):
    fit(0, 4, 6, "right")
