"""Keys that have no meaning next to one another are refused, not ignored."""

import pytest
from config_test import ROOT, parse, refusal

GATED = f"{ROOT}/configs/tiny.py:gated"


@pytest.mark.parametrize(
  ("config", "flag", "message"),
  [
    (GATED, "objective.loss_weights=(0.1,)", "loss_weights=(1.0,) (it is (0.1,))"),
    (GATED, "model.head_gradient=recompute", "leave it at 'auto'"),
    (f"{ROOT}/configs/tiny.py", "noise.anchors=4", "leave it at 0"),
    (f"{ROOT}/configs/tiny.py", "noise.random=True", "leave it at False"),
    (f"{ROOT}/configs/tiny.py", "objective.draft_target=tv", "leave it at 'kl'"),
  ],
)
def test_what_would_be_ignored_with_this_kind_of_adapter_is_refused(config, flag, message):
  assert message in refusal(f"--config.{flag}", config=config)


def test_two_rounds_of_a_gated_adapter_are_refused():
  message = refusal(
    "--config.objective.num_iterations=2",
    "--config.objective.loss_weights=(1.0, 0.5)",
    config=GATED,
  )
  assert "num_iterations=1 (it is 2)" in message


def test_the_keys_of_a_gated_adapter_are_taken_with_one():
  c = parse(
    "--config.noise.anchors=4",
    "--config.noise.random=True",
    "--config.objective.draft_target=tv",
    config=GATED,
  )
  assert (c.noise.anchors, c.noise.random, c.objective.draft_target) == (4, True, "tv")
