"""Benchmarks run, end with one JSON object, and their numbers follow from each other.

Nothing here asserts a time.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  attention,
  budgets,
  custom_generate,
  embedding,
  engine,
  gated,
  head,
  input,
  sampler,
  server,
  step,
  timing,
)
from refine_jax.attention import packed
from refine_jax.data import load_examples, train_rows
from refine_jax.hf import config as hf_config
from refine_jax.model import transformer
from refine_jax.training import flops
from tests import custom_generate_fixtures, data_fixtures

TINY = timing.SHAPES["tiny"]
TOKENS = TINY.rows * TINY.length
PEAK = 2e12


@pytest.fixture
def run(capsys, monkeypatch):
  """Runs a benchmark; its object, which is also the last line that it prints."""
  # As on a device whose peaks are known, so that shares of them are computed.
  monkeypatch.setattr(flops, "peak_flops", lambda: PEAK)
  monkeypatch.setattr(flops, "peak_bandwidth", lambda: 1e11)

  def call(benchmark, *options):
    result = benchmark.main(["--shape=tiny", "--repeats=1", "--json", *options])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    return result

  return call


@pytest.fixture
def alone(tmp_path_factory):
  yield from custom_generate_fixtures.alone(tmp_path_factory)


def test_custom_generate_is_timed_beside_transformers(run, alone):
  options = ["--rows=2", "--problems=4", "--prompt=5", "--new=6", "--adapter_rank=2"]
  result = run(custom_generate, *options)
  assert result["same_answers"] == 1 and result["tokens"] == 24
  ratio = result["transformers_ms_per_token"] / result["custom_ms_per_token"]
  assert result["speedup"] == pytest.approx(ratio)
  per_pass = result["custom_ms_per_row_pass"] / result["tokens_per_pass"]
  assert result["custom_ms_per_token"] == pytest.approx(per_pass)


def matmul_parameters(config) -> int:
  """From the parameters themselves: matrices that a token is multiplied with."""
  leaves = jax.tree_util.tree_leaves_with_path(transformer.param_shapes(config))
  return sum(x.size for path, x in leaves if path[-1].key in ("kernel", "head"))


def seen_pairs(segment_ids_BT) -> int:
  return int(np.sum(packed.mask_BTT(jnp.asarray(segment_ids_BT), None)))


def check_step_row(row, rounds):
  assert row["tokens_per_second"] == pytest.approx(TOKENS / row["step_ms"] * 1e3)
  flops = row["tokens_per_second"] * row["flops_per_token"]
  assert row["model_tflops_per_second"] == pytest.approx(flops / 1e12)
  assert row["mfu"] == pytest.approx(flops / PEAK)
  segments = TINY.segments if row["variant"] == "packed" else 1
  ids = step.random_batch(TINY, packed=segments > 1, prompt=1).segment_ids[0]
  assert len(np.unique(ids)) == segments
  c = TINY.model
  # The convention has each token see half of its example: the diagonal's half is left out.
  pairs = sum(n * n / 2 for row in ids for n in np.unique(row, return_counts=True)[1])
  assert pairs <= seen_pairs(ids)
  scores = pairs / TOKENS * 2 * 2 * c.heads * c.head_dim * c.layers
  want = rounds * 3 * (2 * matmul_parameters(c) + scores)
  assert row["flops_per_token"] == pytest.approx(want, rel=0.005)  # whole tokens of length


def test_step(run):
  results = {2: run(step), 4: run(step, "--rounds=4", "--variants=packed")}
  assert [row["variant"] for row in results[2]["rows"]] == ["packed", "one example a row"]
  for rounds, result in results.items():
    for row in result["rows"]:
      check_step_row(row, rounds)
      assert np.isfinite(row["loss"]) and row["compile_seconds"] > 0
      assert row["argument_bytes"] > 3 * 4 * compute_parameters()
    for name in ("tokens_per_second", "mfu", "temp_bytes", "compile_seconds", "peak_gib"):
      assert result[name] == result["rows"][0][name]
    assert result["times_peer"] is None and result["matmul_ceiling_tflops"] > 0
  assert results[4]["temp_bytes"] <= 1.02 * results[2]["temp_bytes"]


@pytest.mark.parametrize(
  ("options", "rows", "length", "blocks"),
  [
    (["--accumulation=2", "--target=tv", "--rank=4"], TINY.rows, TINY.length, None),
    (["--rows=1", "--length=256", "--segments=1", "--anchors=3", "--remat=none"], 1, 256, 3),
  ],
)
def test_gated_step(run, options, rows, length, blocks):
  result = run(gated, *options)
  (row,) = result["rows"]
  assert (row["rows"], row["length"]) == (rows, length)
  # Whole responses: prompts of 8 get no blocks, whole tiles at the start and one at the phase.
  segments = 1 if blocks else TINY.segments
  assert blocks in (None, row["blocks"])
  if blocks is None:
    responses = length - segments * 8
    assert responses / 15 < row["blocks"] <= responses / 15 + 2 * segments
  assert row["tokens_per_second"] == pytest.approx(rows * length / row["step_ms"] * 1e3)
  c, drafts = TINY.model, row["blocks"] * 15 / length
  attention = 2 * c.layers * c.heads * c.head_dim * length / segments
  flops = (2 * matmul_parameters(c) + attention) * (1 + 2 * drafts)
  assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / PEAK)
  assert np.isfinite(row["loss"]) and result["compile_seconds"] > 0


def compute_parameters() -> int:
  return sum(x.size for x in jax.tree.leaves(transformer.param_shapes(TINY.model)))


def test_step_beside_pytorch(run):
  pytest.importorskip("torch")
  result = run(step, "--peer", "--variants=unpacked")
  ours, joint, by_round = result["rows"]
  assert joint["rows"] == 1 and by_round["rows"] == ours["rows"] == 2
  for row in (joint, by_round):
    tokens = row["rows"] * row["length"]
    assert row["tokens_per_second"] == pytest.approx(tokens / row["step_ms"] * 1e3)
    # The same function counts for both.
    flops = row["tokens_per_second"] * ours["flops_per_token"]
    assert row["mfu"] == pytest.approx(flops / PEAK)
    assert row["loss"] == pytest.approx(2 * np.log(TINY.model.vocab_size), rel=0.01)
  best = max(joint["tokens_per_second"], by_round["tokens_per_second"])
  assert ours["times_peer"] == pytest.approx(ours["tokens_per_second"] / best)
  assert result["times_peer"] == ours["times_peer"]


def test_pytorch_step_is_a_training_step_of_the_rounds():
  torch = pytest.importorskip("torch")
  from benchmarks import torch_step

  after = {}
  for backward in ("joint", "round"):
    torch.manual_seed(0)
    net = torch_step.make_model(TINY.model, "cpu")
    before = net.lm_head.weight.detach().clone()
    run_step = torch_step.Step(net, 2, 32, rounds=2, backward=backward, prompt=4, device="cpu")
    run_step()
    after[backward] = net.lm_head.weight.detach()
    assert not torch.equal(before, after[backward])
  # Greedy predictions stop gradients, so both ways are one gradient. Adam's first step is the
  # gradient's sign, which rounding decides where the gradient is nearly nothing.
  differs = (after["joint"] - after["round"]).abs() > 1e-7
  assert differs.float().mean() < 1e-3
  # The loss of a round, and what the next one reads, against plain PyTorch.
  ids = run_step.clean
  loss, following = run_step._round(ids)
  logits = net(input_ids=ids).logits
  clean, scored = ids[:, 4:], logits[:, 3:-1]
  want = torch.nn.functional.cross_entropy(scored.flatten(0, 1), clean.flatten())
  torch.testing.assert_close(loss, want)
  assert torch.equal(following[:, :4], ids[:, :4])
  assert torch.equal(following[:, 4:], scored.argmax(-1))


def test_config_json_of_the_shapes():
  torch_step = pytest.importorskip("benchmarks.torch_step")
  for shape in timing.SHAPES.values():
    assert hf_config.from_hf(torch_step.hf_values(shape.model)) == shape.model


def test_head(run):
  result = run(head, "--chunks=64,256")
  c = TINY.model
  assert result["flops"] == 6 * TOKENS * c.width * c.vocab_size
  ceiling = result["matmul_ceiling_tflops"] * 1e12
  assert result["floor_ms"] == pytest.approx(result["flops"] / ceiling * 1e3)
  assert [(r["chunk"], r["gradient"]) for r in result["rows"]] == [
    (64, "forward"),
    (64, "recompute"),
    (256, "forward"),
    (256, "recompute"),
  ]
  assert result["best_ms"] == min(row["ms"] for row in result["rows"])
  for row in result["rows"]:
    assert row["tokens_per_second"] == pytest.approx(TOKENS / row["ms"] * 1e3)
    assert row["share_of_ceiling"] == pytest.approx(result["floor_ms"] / row["ms"])
    assert row["compile_seconds"] > 0 and "peak_gib" in row
  # A chunk's logits exist, the arguments are the same for all.
  memory = {(r["chunk"], r["gradient"]): r["temp_bytes"] for r in result["rows"]}
  for gradient in ("forward", "recompute"):
    logits = 4 * (256 - 64) * c.vocab_size
    assert memory[256, gradient] - memory[64, gradient] >= logits
  inputs = 4 * (TOKENS * c.width + c.vocab_size * c.width + 2 * TOKENS)
  assert {row["argument_bytes"] for row in result["rows"]} == {inputs}


def test_attention(run):
  result = run(attention)
  (row,) = result["rows"]
  ids = step.random_batch(TINY, packed=True, prompt=1).segment_ids[0]
  c = TINY.model
  assert row["flops"] == seen_pairs(ids) * 4 * c.heads * c.head_dim
  ceiling = result["matmul_ceiling_tflops"] * 1e12
  assert row["floor_forward_ms"] == pytest.approx(row["flops"] / ceiling * 1e3)
  assert row["tokens_per_second"] == pytest.approx(TOKENS / row["forward_backward_ms"] * 1e3)
  assert row["error"] < 1e-6
  assert row["temp_bytes"] > 0 and row["compile_seconds"] > 0 and "peak_gib" in row


def test_embedding(run):
  result = run(embedding, "--share=0.75")
  ids = embedding.noised_ids(4000, 100, 0.75)
  assert np.mean(ids == 99) == pytest.approx(0.75, abs=0.03)
  assert not np.any(embedding.noised_ids(4000, 100, 0.0) == 99)
  strategies = ("model", "scatter float32", "scatter bfloat16", "sorted")
  assert [(r["strategy"], r["noise_share"]) for r in result["rows"]] == [
    (name, share) for name in strategies for share in (0.0, 0.75)
  ]
  for row in result["rows"]:
    assert row["tokens_per_second"] == pytest.approx(TOKENS / row["ms"] * 1e3)
    assert row["share_of_ceiling"] == pytest.approx(result["floor_ms"] / row["ms"])
    assert row["error"] < (0.1 if "bfloat16" in row["strategy"] else 1e-5)


def test_budgets(run):
  options = ("--rows=2", "--problems=3", "--new=6", "--plans=ar,budget:8")
  result = run(budgets, *options)
  assert [row["plan"] for row in result["rows"]] == ["ar", "budget:8", "auto"]
  ar, budget, auto = result["rows"]
  assert ar["tokens_per_pass"] == 1 and all(row["same"] == 1 for row in result["rows"])
  for row in (ar, budget):
    rate = 2 * row["tokens_per_pass"] / row["step_ms"] * 1e3
    assert row["tokens_per_second"] == pytest.approx(rate)
    assert row["times_ar"] == pytest.approx(rate / ar["tokens_per_second"])
  assert result["worst_auto"] == auto["times_ar"] and result["choosing_share"] == {}


def byte_lengths(texts, max_length) -> list[int]:
  """Lengths of examples after truncation: a token a character, three of the template, and EOS."""
  return [
    min(len(prompt) + 3 + len(response) + 1, max_length)
    for prompt, response in zip(*texts, strict=True)
    if len(prompt) + 3 < max_length
  ]


def test_input(run):
  options = ("--examples=300", "--batches=10", "--step_ms=2", "--batch=4", "--max_length=96")
  result = run(input, *options)
  lengths = byte_lengths(input.synthetic_texts(300, 96), 96)
  assert (result["examples"], result["tokens"]) == (len(lengths), sum(lengths))
  tokens = sum(lengths)
  assert result["tokenise_tokens_per_second"] == pytest.approx(
    tokens / result["cold_start_seconds"]
  )
  packed, unpacked = result["rows"]
  assert unpacked["packing_efficiency"] == pytest.approx(tokens / (len(lengths) * 96))
  for row in (packed, unpacked):
    slots = row["rows_an_epoch"] * 96
    assert row["packing_efficiency"] == pytest.approx(tokens / slots)
    assert row["tokens_per_second"] == pytest.approx(
      row["batches_per_second"] * row["tokens_a_batch"]
    )
    assert row["wait_share"] == pytest.approx(row["wait_ms"] / (row["wait_ms"] + 2))
  assert result["packing_efficiency"] == packed["packing_efficiency"] >= 0.95
  assert packed["packing_efficiency"] <= 1 and packed["most_examples_a_row"] > 1
  assert result["packing_gain"] == pytest.approx(len(lengths) / packed["rows_an_epoch"])
  assert packed["tokens_a_batch"] / (4 * 96) == pytest.approx(packed["packing_efficiency"], abs=0.1)


def test_input_from_a_file(run, tmp_path):
  tokenizer = data_fixtures.make_tokenizer()
  tokenizer.save_pretrained(tmp_path / "tokenizer")
  prompts = [f"what is {i} and {i}?" for i in range(40)]
  targets = ["the answer is simple " * (i % 5 + 1) for i in range(40)]
  path = data_fixtures.write_parquet(tmp_path / "a.parquet", prompts, targets)
  result = run(
    input,
    f"--data={path}",
    f"--tokenizer={tmp_path / 'tokenizer'}",
    "--max_length=64",
    "--batch=2",
    "--batches=5",
    "--step_ms=1",
  )
  config = data_fixtures.data_config()
  examples = load_examples(path, config, tokenizer, name="train", vocab_size=len(tokenizer))
  assert (result["examples"], result["tokens"]) == (len(examples), len(examples.tokens))
  # Packing efficiency, counted in the batches of an epoch.
  rows = train_rows(examples, config, batch_size=2, total_epochs=1, seed=0)
  filled = [rows.batch([i]).segment_ids > 0 for i in range(len(rows))]
  assert result["packing_efficiency"] == pytest.approx(np.mean(filled))


def test_input_needs_data_and_tokenizer_together():
  with pytest.raises(SystemExit):
    input.main(["--data=a.parquet"])


def test_sampler(run):
  pytest.importorskip("torch")
  result = run(sampler, "--batches=1,2", "--blocks=1,4", "--new=12", "--prompt=16", "--peer")
  config = TINY.model
  assert result["weight_bytes"] == 4 * (compute_parameters() - config.vocab_size * config.width)
  assert [(p["batch"], p["block"]) for p in result["passes"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
  bandwidth = result["copy_ceiling_gb_per_second"] * 1e9
  ceiling = result["matmul_ceiling_tflops"] * 1e12
  for p in result["passes"]:
    tokens = p["batch"] * p["block"]
    pair = 2 * config.layers * config.kv_heads * config.head_dim * 4
    moved = result["weight_bytes"] + (p["batch"] * 16 + tokens) * pair
    work = 2 * matmul_parameters(config) + 16 * 4 * config.layers * config.heads * config.head_dim
    assert (p["bytes"], p["flops"]) == (moved, tokens * work)
    times = (moved / bandwidth * 1e3, tokens * work / ceiling * 1e3)
    assert p["roofline_ms"] == pytest.approx(max(times))
    assert p["bound"] == ("memory" if times[0] >= times[1] else "compute")
    assert p["roofline_share"] == pytest.approx(max(times) / p["pass_ms"])
    nominal = max(moved / 1e11, tokens * work / PEAK) * 1e3
    assert p["nominal_roofline_share"] == pytest.approx(nominal / p["pass_ms"])
    assert p["host_share"] == pytest.approx(1 - p["pass_ms"] / p["loop_ms"])
    assert p["stream_host_share"] == pytest.approx(1 - p["pass_ms"] / p["call_ms"])
    assert p["prefill_ms"] > 0 and 1 <= p["loop_passes"]
  check_modes(result["rows"])


def test_engine(run):
  """Few programs for many calls; the same tokens with and without refills, which are compared."""
  sizes = ("--calls=4", "--rows=3", "--longest=60", "--problems=6", "--slots=2", "--new=4")
  result = run(engine, "--parts=calls,refill", *sizes)
  assert 3 <= result["programs"] <= 6 and result["xla_programs"] >= result["programs"]
  batches, refilled = result["rows"]
  assert batches["tokens"] == refilled["tokens"] >= 6 * 4
  assert result["refill_gain"] == pytest.approx(batches["seconds"] / refilled["seconds"])
  for row in result["rows"]:
    spent = row["seconds"] - row["prefill_seconds"] - row["decode_seconds"]
    assert row["host_ms_a_step"] == pytest.approx(spent / row["steps"] * 1e3)


def test_server(run):
  """Streams to clients in another process, all of them whole."""
  result = run(server, "--streams=2", "--new=6", "--prompt=5")
  assert result["share"] == pytest.approx(
    result["tokens_per_second"] / result["engine_tokens_per_second"]
  )
  assert 0 < result["first_token_ms"] < 60_000 and result["between_pieces_ms"] > 0


def test_an_adapters_cost_is_the_ratio_of_two_passes(run):
  options = ("--batches=1", "--blocks=3", "--new=8", "--prompt=16", "--modes=", "--draft=branches")
  result = run(sampler, *options, "--adapter_rank=2")
  alone, adapted = result["passes"]
  assert (alone["adapter_rank"], adapted["adapter_rank"]) == (0, 2)
  ratio = adapted["pass_ms"] / alone["pass_ms"]
  assert result["times_without_adapter"] == {"1 x 3": pytest.approx(ratio)}


def check_modes(rows):
  ours, peers = rows[:6], {(row["mode"], row["batch"]): row for row in rows[6:]}
  assert [(r["mode"], r["batch"]) for r in ours] == [
    (mode, batch) for batch in (1, 2) for mode in ("ar", "exact", "fixed")
  ]
  assert len(peers) == 4
  for row in ours:
    name = "torch refinement" if row["mode"] == "fixed" else "torch generate"
    peer = peers[name, row["batch"]]
    assert row["tokens"] == 12 * row["batch"] == peer["tokens"]
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["decode_ms"] * 1e3)
    for r in (row, peer):
      assert r["wall_tokens_per_second"] == pytest.approx(r["tokens"] / r["wall_ms"] * 1e3)
    assert row["wall_ms"] >= row["decode_ms"] + row["prefill_ms"]
    speeds = row["wall_tokens_per_second"], peer["wall_tokens_per_second"]
    assert row["times_peer"] == pytest.approx(speeds[0] / speeds[1])
    assert row["passes"] <= {"ar": 12, "exact": 12, "fixed": 4}[row["mode"]]
    # float32: the text is that of PyTorch on the same weights.
    assert row["same_as_peer"] == 1
  assert all(row["passes"] == 12 for row in ours if row["mode"] == "ar")
