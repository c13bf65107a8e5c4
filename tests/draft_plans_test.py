"""What drafts' probabilities are worth, how a budget is shared out, and which plan is chosen."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import sampler_fixtures
import scipy.optimize
import scipy.special
from hf_fixtures import tiny_hf_model
from sampler_budget_test import shared_out

import refine_jax
from refine_jax import target
from refine_jax.decoding import calibrate, device_plans, plans
from refine_jax.decoding.drafts import allocation
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import Options
from refine_jax.decoding.plans import Chooser, Plan
from refine_jax.decoding.requests import requests
from refine_jax.decoding.result import Pass
from refine_jax.decoding.settings import Settings, settings_for
from refine_jax.errors import UserError
from refine_jax.evaluation import tune
from refine_jax.hf import calibration
from refine_jax.hf.calibration import Calibration, Curve
from refine_jax.hf.generation_config import Refinement, read_generation_config
from refine_jax.target import Target

EOS = sampler_fixtures.EOS
AR, SMALL = Plan("ar", 1, 0, 1.0, 1.0), Plan("budget", 4, 8, 1.5, 3.0)
ALL = (AR, SMALL, Plan("branches", 4, 0, 3.0, 4.0), Plan("cycle", 4, 4, 1.2, 2.0))


@pytest.mark.parametrize("most, room", [(4, 6), (7, 15), (15, 40)])
def test_tokens_go_where_they_are_worth_most(most, room):
  rng = np.random.default_rng(room)
  chance = rng.beta(2, 1, (30, most)).astype(np.float32)
  known = rng.integers(0, most + 1, 30)
  worth = np.cumprod(rng.uniform(0.7, 1, most)).astype(np.float32)
  got = allocation.by_chance(chance, known, worth, np.full(30, room))
  for row, count in enumerate(known):
    drafts, runs = shared_out(chance[row, :count], worth, room)
    assert got.drafts[row] == drafts
    assert got.runs[row, : drafts + 1].tolist() == runs and not got.runs[row, drafts + 1 :].any()
  assert np.all(got.drafts + got.runs.sum(axis=1) <= room)


def test_a_curve_is_the_most_likely_one():
  """Against scipy's minimum of the same sum; and it takes most of the error away."""
  rng = np.random.default_rng(0)
  p = rng.uniform(0.05, 0.95, 20_000)
  truth = 1 / (1 + np.exp(-(np.log(p / (1 - p)) / 2.5 + 0.7)))
  right = rng.random(len(p)) < truth
  curve = calibration.fit([p], [right])

  def loss(weights):
    z = weights[0] * np.log(p / (1 - p)) + weights[1]
    return np.sum(np.logaddexp(0, z) - right * z)

  want = scipy.optimize.minimize(loss, [1.0, 0.0]).x
  np.testing.assert_allclose([1 / curve.temperature[0], curve.shift[0]], want, rtol=0.01)
  after = np.asarray(calibration.chances(curve, p[:, None]))[:, 0]
  np.testing.assert_allclose(after, truth, atol=0.02)
  assert calibration.calibration_error(p, right) > 0.1
  assert calibration.calibration_error(after, right) < 0.015


def test_the_calibration_error_is_that_of_its_bins():
  chance, right = np.array([0.1, 0.2, 0.9, 0.6]), np.array([False, True, True, False])
  assert calibration.calibration_error(chance, right, bins=2) == pytest.approx((0.35 + 0.25) / 2)
  assert calibration.calibration_error(chance[:0], right[:0]) == 0


def test_what_a_trace_says_of_drafts():
  """The first pass's drafts are the prompt's; the last pass may have ended before a wrong one."""
  row = [
    Pass(0, [1, 2, 3, 4], [1.0, 0.9, 0.8, 0.7], 2),
    Pass(2, [3, 9, 8, 7], [1.0, 0.5, 0.4, 0.3], 2),  # of the drafts 3, 4 the first is right
    Pass(4, [8, 7, 5], [1.0, 1.0, 1.0], 2),  # ended after the first
  ]
  found = calibrate.drafts_of([row], 3)
  assert [x.tolist() for x in found.probability] == [[0.8, 0.4], [0.7], []]
  assert [x.tolist() for x in found.right] == [[True, True], [False], []]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory, _ = tiny_hf_model("qwen3", tmp_path_factory.mktemp("plans"), num_hidden_layers=2)
  loaded = refine_jax.load(directory)
  return dataclasses.replace(loaded, refinement=Refinement(EOS, 4))


def test_a_calibration_is_kept_in_generation_config(model, tmp_path):
  report = calibrate.calibrate(model, [[3, 5, 7], [4, 4, 9], [8, 1]], new=24)
  assert sum(report.counts["greedy"]) > 10 and sum(report.counts["sampled"]) > 10
  assert report.calibration.greedy != report.calibration.sampled
  refinement = {"noise_token": EOS, "block_size": 4}
  values = {"refinement": refinement | {"calibration": calibration.describe(report.calibration)}}
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "generation_config.json").write_text(json.dumps(values))
  read = read_generation_config(tmp_path, model.config).refinement
  assert read == Refinement(EOS, 4, calibration=report.calibration)
  for damage in ({"greedy": None}, {"sampled": {"temperature": [1]}}, {"greedy": {**_curve(0)}}, 3):
    bad = damage if damage == 3 else calibration.describe(report.calibration) | damage
    values["refinement"]["calibration"] = bad
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="calibration.*must be an object of lists"):
      read_generation_config(tmp_path, model.config)


def _curve(temperature):
  return {"temperature": [temperature], "shift": [0.0], "accepted": [0.5]}


def test_a_plan_is_kept_while_it_pays():
  chooser = Chooser(ALL)
  assert chooser.current == SMALL  # 2 tokens a millisecond
  assert chooser.observe(tokens=300, passes=100) == SMALL
  seen = [chooser.observe(tokens=100, passes=100).draft for _ in range(12)]
  assert seen[-1] == "ar" and seen.count("ar") == len(seen) - seen.index("ar")
  # Later it tries again, and less often the more often that was in vain.
  tried = [chooser.observe(tokens=100, passes=100).draft != "ar" for _ in range(3000)]
  starts = [i for i in range(1, len(tried)) if tried[i] and not tried[i - 1]]
  assert len(starts) > 3 and sum(tried) < 0.05 * len(tried)
  assert starts[1] - starts[0] < 200 and 2 * starts[0] < starts[2] - starts[1]


def test_measured_rows_are_never_extrapolated():
  measured = {1: (SMALL,), 8: (AR, SMALL), 32: (AR,)}
  found = {rows: plans.chosen(measured, rows) for rows in (1, 2, 8, 9, 32, 33)}
  want = {1: (SMALL,), 2: (AR, SMALL), 8: (AR, SMALL), 9: (AR,), 32: (AR,), 33: None}
  assert found == want


def on_device(kind):
  return target.compiling_for(Target("cpu" if kind == "cpu" else "gpu", kind, None))


SMALL_MODEL, LARGE_MODEL = 106_000_000, 1_310_000_000


@pytest.mark.parametrize(
  "kind, parameters, itemsize, most",
  [
    ("cpu", SMALL_MODEL, 4, 8),
    ("NVIDIA H100 80GB HBM3", LARGE_MODEL, 2, 8192),
    ("NVIDIA H200", SMALL_MODEL, 2, 8192),
    ("NVIDIA H100 80GB HBM3", SMALL_MODEL, 4, 32),
    ("NVIDIA A100-SXM4-40GB", SMALL_MODEL, 2, 64),
    ("TPU v5 lite", LARGE_MODEL, 4, 32),
  ],
)
def test_built_in_plans_hold_ar_and_no_pass_that_was_not_measured(kind, parameters, itemsize, most):
  model = {"adapted": True, "parameters": parameters, "itemsize": itemsize}
  with on_device(kind):
    for rows in (1, 2, 8, 32, 64, 128, 300, 2000):
      found = device_plans.built_in(rows, 16, **model)
      assert found[0][:3] == ("ar", 1, 0)
      for plan in found[1:]:
        tokens = plan.block**2 if plan.draft == "branches" else plan.budget
        assert rows * tokens <= most and plan.milliseconds >= found[0].milliseconds
      without = device_plans.built_in(rows, 16, trained=False, **model)
      assert [plan.draft for plan in without] in (["ar"], ["ar", "tail"])
      for block in (1, 4):
        smaller = device_plans.built_in(rows, block, **model)
        assert all(plan.block <= block and plan.tokens <= block for plan in smaller)
        assert len(smaller) == (len(found) if block > 1 else 1)


def test_an_h100_has_the_plans_that_were_measured_best():
  model = {"adapted": True, "parameters": SMALL_MODEL, "itemsize": 2}
  with on_device("NVIDIA H100 80GB HBM3"):
    best = {}
    for rows in (1, 2, 32, 33, 128):
      plan = Chooser(device_plans.built_in(rows, 16, **model)).current
      best[rows] = (plan.draft, plan.block)
    assert best == {1: ("branches", 16)} | dict.fromkeys((2, 32, 33, 128), ("cycle", 16))
    # 129 rows were not measured, and what a larger model's passes cost says that nothing pays.
    assert Chooser(device_plans.built_in(129, 16, **model)).current.draft == "ar"


def test_exact_chooses_its_drafts_by_default(model):
  """On a CPU they pay for one row alone; a named block or draft is what runs."""

  def drafts(slots, of=model, **options):
    settings = settings_for(of, Options(**options), slots)
    return [plan.draft for plan in settings.plans] or [settings.draft, settings.block]

  assert drafts(1) == drafts(1, draft="auto") == ["ar", "budget", "budget"]
  alone = settings_for(model, Options(mode="ar"), 8)
  assert settings_for(model, Options(), 8) == settings_for(model, Options(draft="auto"), 8) == alone
  assert drafts(8, block_size=4) == ["branches", 4]
  assert drafts(8, draft="cycle") == ["cycle", 4]
  untrained = dataclasses.replace(model, refinement=None)
  assert settings_for(untrained, Options(), 1).block == 1
  assert drafts(1, untrained, block_size=4) == ["tail", 4]


@pytest.mark.parametrize(
  "text", ["[1]", "{", '{"cpu": {"1": [{"draft": "x"}]}}', '{"cpu": {"a": []}}']
)
def test_a_damaged_table_is_named(tmp_path, text):
  (tmp_path / plans.NAME).write_text(text)
  with pytest.raises(UserError, match="is no table of drafts"):
    plans.read(tmp_path)
  assert plans.read(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}], ids=str)
def test_the_text_is_the_same_whichever_plan_runs_next(model, monkeypatch, options):
  """A plan a step, in turn, through refilled slots whose caches grow, a trace among them."""
  prompts = sampler_fixtures.unequal_prompts(5, model.config.vocab_size)
  common = {"max_new_tokens": 20, "eos_token_id": EOS, "noise_token": EOS} | options
  want = refine_jax.generate(model, prompts, mode="ar", **common).tokens
  used = []

  def in_turn(self, tokens, passes):
    used.append(self.current.draft)
    self.current = ALL[len(used) % len(ALL)]
    return self.current

  monkeypatch.setattr(Chooser, "observe", in_turn)
  measured = dataclasses.replace(model, plans={"cpu": {8: ALL}})
  engine = Engine(measured, 3, options=Options(draft="auto"))
  wanted = requests(model, prompts, Options(draft="auto", **common))
  for request in wanted:
    engine.submit(request)
  answers = {}
  while engine.busy:
    answers |= {answer.request: answer for answer in engine.step(2)}
  assert [answers[request].tokens for request in wanted] == want
  assert set(used) == {plan.draft for plan in ALL}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"budget": 8}, "budget=8 needs draft=budget or cycle"),
    ({"draft": "budget", "budget": 1}, "budget=1 cannot be"),
    ({"draft": "budget", "mode": "threshold"}, "needs mode='exact'"),
    ({"draft": "auto", "mode": "fixed"}, "needs mode='exact'"),
    ({"log_probabilities": True, "mode": "fixed"}, "needs mode exact or ar"),
  ],
)
def test_options_that_cannot_be_together_are_named(options, message):
  with pytest.raises(UserError, match=message):
    Options(**options)


@pytest.mark.parametrize(
  "options", [{"draft": "budget", "budget": 7}, {"draft": "tail"}, {"mode": "ar"}], ids=str
)
def test_log_probabilities_are_the_models_own(model, options):
  """Of greedy rows and of samples, those that end early among them, against whole sequences."""
  prompts = sampler_fixtures.unequal_prompts(4, model.config.vocab_size, seed=1)
  for temperature in (0.0, 0.7):
    out = refine_jax.generate(
      model,
      prompts,
      log_probabilities=True,
      temperature=temperature,
      max_new_tokens=12,
      eos_token_id=EOS,
      noise_token=EOS,
      slots=2,
      **options,
    )
    for prompt, tokens, found in zip(prompts, out.tokens, out.log_probabilities, strict=True):
      logits = np.asarray(model(np.array([prompt + tokens])))[0, len(prompt) - 1 : -1]
      logits = scipy.special.log_softmax(logits / (temperature or 1.0), axis=-1)
      np.testing.assert_allclose(found, logits[np.arange(len(tokens)), tokens], atol=1e-4)
  assert min(map(len, out.tokens)) < 12
  assert refine_jax.generate(model, prompts[:1], max_new_tokens=1).log_probabilities is None


def test_a_tuned_directory_is_read_by_engines(tmp_path, monkeypatch, capsys):
  directory, _ = tiny_hf_model("llama", tmp_path, num_hidden_layers=1)
  place = directory / "generation_config.json"
  values = json.loads(place.read_text()) if place.exists() else {}
  place.write_text(json.dumps(values | {"refinement": {"noise_token": EOS, "block_size": 4}}))
  data = tmp_path / "prompts.jsonl"
  data.write_text("\n".join(json.dumps({"prompt": [3 + i, 5]}) for i in range(4)))
  monkeypatch.setattr(tune, "_BUDGETS", (8,))
  monkeypatch.setattr(tune, "_CYCLES", ())
  best = [(plan.draft, plan.block) for rows in (1, 8) for plan in tune.candidates(rows, 16)]
  assert [pair for pair in best if pair[0] == "branches"] == [("branches", n) for n in (8, 16, 8)]
  monkeypatch.setattr(tune, "_REPEATS", 1)
  command = f"tune --model={directory} --data={data} --rows=2 --max_new_tokens=12"
  monkeypatch.setattr(sys, "argv", command.split())
  with pytest.raises(SystemExit) as ended:
    tune.main()
  assert ended.value.code in (0, None)
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1].startswith("rows=2 best=") and "worst offset" in lines[0]
  model = refine_jax.load(directory)
  assert model.refinement.calibration is not None
  (found,) = model.plans["cpu"].values()
  assert [plan.draft for plan in found] == ["ar", "budget"]
  assert Engine(model, 2, options=Options(draft="auto")).settings.plans == found


def test_a_draft_that_no_pass_verified_is_no_text():
  """The copier says i + 1 after i, so after noise 4 too, which is right behind the prompt's 4."""
  unsure = Calibration(Curve((1.0,), (-30.0,), (0.9,)))
  copier = sampler_fixtures.copier_model()
  copier = dataclasses.replace(copier, refinement=Refinement(4, 3, calibration=unsure))
  out = refine_jax.generate(copier, [[4]], draft="budget", budget=3, max_new_tokens=8)
  assert out.tokens == [list(range(5, 13))]
  assert out.passes == [8]  # all tokens were spent on noise


@pytest.mark.parametrize("block, budget", [(16, 16), (8, 9), (4, 40)])
def test_a_row_has_room_for_what_a_pass_reads_and_predicts(block, budget):
  settings = Settings(block=block, draft="budget", budget=budget)
  assert (settings.tokens, settings.width) == (budget, 2 * block - 1)
  assert settings.reach >= max(budget, 2 * block - 1)
