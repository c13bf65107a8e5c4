"""The reasoning problems: solvable as written, and each in one split only."""

import json

import pytest

from refine_jax.errors import UserError
from refine_jax.evaluation import scoring
from scripts import make_tasks


@pytest.fixture(scope="module")
def splits():
  seen = set()
  return {split: make_tasks.build(split, 60, seen)[0] for split in ("test", "val", "train")}


def test_every_target_solves_its_problem_and_a_spoilt_one_does_not(splits):
  for rows in splits.values():
    for row in rows:
      assert scoring.reasoning_gym(row["target"], row)
      assert not scoring.reasoning_gym(row["target"] + "7", row)
      assert row["target"].splitlines()[-1] == f"Answer: {row['answer']}"
      assert len(row["target"].splitlines()) > 1  # there are steps
      json.loads(row["meta"])


def test_a_prompt_is_in_one_split_only_once(splits):
  prompts = [row["prompt"] for rows in splits.values() for row in rows]
  assert len(set(prompts)) == len(prompts) == 180
  # What was seen before is passed over, and others come instead.
  seen = {row["prompt"] for row in splits["test"]}
  again, _ = make_tasks.build("test", 60, seen.copy())
  assert len(again) == 60 and not seen & {row["prompt"] for row in again}


def test_tasks_have_equal_shares_and_come_out_the_same_again(splits):
  rows, made = make_tasks.build("test", 60, set())
  assert rows == splits["test"]
  assert made == dict.fromkeys(make_tasks.TASKS, 10)
  assert len({row["task"] for row in rows[:20]}) > 3  # shuffled


def test_a_row_that_its_scorer_refuses_stops(splits):
  row = splits["val"][0] | {"target": "Answer: 7 or so"}
  with pytest.raises(UserError, match="scorer disagrees with a row of val"):
    make_tasks.check("val", [row])
