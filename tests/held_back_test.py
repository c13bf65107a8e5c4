"""Interrupts that come while a program has the state's memory."""

import signal

import pytest

from refine_jax.interrupt import held_back


def test_an_interrupt_comes_after_the_block():
  done = []
  with pytest.raises(KeyboardInterrupt), held_back():
    signal.raise_signal(signal.SIGINT)
    done.append("whole")
  assert done == ["whole"]
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
