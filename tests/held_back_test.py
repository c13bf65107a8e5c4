"""Interrupts that come while a program has the state's memory."""

import signal

import numpy as np
import pytest
import sampler_fixtures

import refine_jax
from refine_jax.interrupt import held_back


def test_an_interrupt_comes_after_the_block():
  done = []
  with pytest.raises(KeyboardInterrupt), held_back():
    signal.raise_signal(signal.SIGINT)
    done.append("whole")
  assert done == ["whole"]
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_answers_go_on_after_an_interrupt_in_the_call_of_a_pass(tmp_path):
  model = refine_jax.load(sampler_fixtures.text_model_directory(tmp_path))
  options = {"max_new_tokens": 12, "block_size": 3}
  want = refine_jax.generate(model, [[5, 6, 7]], **options).tokens
  stream = refine_jax.stream(model, [[5, 6, 7]], **options)
  next(stream)
  rows = stream._decoder
  (name, program), *_ = rows._programs.items()

  def interrupted(*arguments):
    signal.raise_signal(signal.SIGINT)
    return program(*arguments)

  rows._programs[name] = interrupted
  with pytest.raises(KeyboardInterrupt):
    rows.step(1)
  rows._programs[name] = program
  assert np.asarray(rows.result().tokens[0]).size  # nothing of the state was given away
  while not rows.step(1):
    pass
  assert rows.result().tokens == want
