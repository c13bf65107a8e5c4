"""Draft kinds and budgets by the number of rows: tokens a pass, ms a step, tokens a second.

    python -m benchmarks.budgets --model=DIR --data=test.parquet --rows=1,8,32,64,128

For each number of rows, one engine answers problems with every plan: `ar`, uniform branches,
budgets and cycles (KIND:TOKENS). A step is timed with all rows on their way; tokens a pass are
those of the answers; tokens_per_second is rows x tokens a pass / step, and answered_per_second that
of the whole run, with prompts, refills and the host. `same` is the share of answers with the tokens
of `ar`. At the end "auto" chooses between the plans by what was measured.

choosing_share: a step of budget:K over one of cycle:K, which has as many tokens and nothing to
choose.
"""

import jax
import numpy as np

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.budgets")

from benchmarks import engine as engine_benchmark
from benchmarks import timing
from refine_jax.decoding import loading
from refine_jax.decoding.plans import Plan
from refine_jax.decoding.prompts import prompt_ids
from refine_jax.evaluation import reading, tune
from refine_jax.hf.generation_config import Refinement

_PLANS = (
  "ar,branches:4,branches:8,branches:16,budget:8,budget:16,budget:32,budget:64,cycle:8,cycle:64"
)
_BLOCK = 16


def main(argv=None) -> dict:
  parser = timing.parser(__doc__)
  parser.add_argument("--model", help="a model that was trained with blocks; default: random")
  parser.add_argument("--data", help="problems with prompts; default: random tokens")
  parser.add_argument("--plans", default=_PLANS, help="KIND:TOKENS, `ar` first")
  parser.add_argument("--rows", default="1,8,32,64,128", type=timing.integers)
  parser.add_argument("--most", type=int, default=8192, help="tokens of all rows in a pass")
  parser.add_argument("--problems", type=int, default=256, help="at least as many as rows")
  parser.add_argument("--new", type=int, default=256, help="tokens of an answer, at most")
  parser.add_argument("--prefix", type=int, default=0, help="tokens of other text before a prompt")
  parser.add_argument("--dtype", default=timing.default_dtype())
  arguments = parser.parse_args(argv)
  model = _model(arguments)
  prompts = _prompts(model, arguments)
  rows = []
  for count in arguments.rows:
    rows += _measure(model, prompts, count, arguments)
  summary = {
    "model": arguments.model or arguments.shape,
    "device": jax.local_devices()[0].device_kind,
    "dtype": arguments.dtype,
    "worst_auto": min(row["times_ar"] for row in rows if row["plan"] == "auto"),
    "choosing_share": _choosing(rows),
    "peak_gib": timing.peak_gibibytes(),
  }
  return timing.report(rows, summary, arguments.json)


def _model(arguments) -> loading.Model:
  if arguments.model:
    return loading.load(arguments.model, dtype=arguments.dtype)
  model = engine_benchmark.random_model(arguments.shape)
  return loading.Model(
    model.config, model.params, model.tokenizer, (), None, model.directory, Refinement(0, _BLOCK)
  )


def _prompts(model, arguments) -> list[list[int]]:
  count = max(arguments.problems, *arguments.rows)
  if arguments.data:
    found = reading.read(arguments.data, count, "--data", ("prompt",)).rows
    known = [prompt_ids(model, row["prompt"], "", "A prompt") for row in found]
  else:
    size = model.config.vocab_size
    known = np.random.default_rng(0).integers(0, size, (count, 100)).tolist()
  text = [token for prompt in known for token in prompt]
  text *= arguments.prefix // len(text) + 2
  starts = [i * 97 % len(known[0]) for i in range(count)]
  return [
    text[start : start + arguments.prefix] + known[i % len(known)] for i, start in enumerate(starts)
  ]


def _plan(text: str, block: int) -> Plan:
  kind, _, number = text.partition(":")
  if kind == "ar":
    return Plan("ar", 1, 0, 1.0, 1.0)
  size = int(number)
  if kind == "branches":
    return Plan(kind, min(size, block), 0, 1.0, 1.0)
  return Plan(kind, min(size, block), size, 1.0, 1.0)


def _tokens(plan: Plan) -> int:
  return plan.block**2 if plan.draft == "branches" else max(plan.budget, 1)


def _measure(model, prompts, rows, arguments) -> list[dict]:
  trained = model.refinement
  block = (trained and trained.block_size) or _BLOCK
  named = {text: _plan(text, block) for text in arguments.plans.split(",")}
  named = {k: plan for k, plan in named.items() if rows * _tokens(plan) <= arguments.most}
  some = prompts[: max(rows, min(arguments.problems, 4 * rows + 28))]
  more = arguments.new, arguments.repeats
  engine = tune.engine_with(model, rows, list(named.values()), some, *more)
  compile_seconds = engine.costs.compile_seconds
  found, answers, measured = [], {}, []
  for name, plan in named.items():
    engine.use([plan])
    seconds = tune.step_seconds(engine, some[:rows], arguments.repeats)
    tokens, rate, answers[name] = tune.answered(engine, some, arguments.new)
    measured.append(plan._replace(milliseconds=seconds * 1e3, tokens=max(tokens, 1.0)))
    row = {
      "rows": rows,
      "plan": name,
      "tokens": _tokens(plan),
      "tokens_per_pass": tokens,
      "step_ms": seconds * 1e3,
      "tokens_per_second": rows * tokens / seconds,
      "answered_per_second": rate,
      "same": _same(answers[name], answers),
      "compile_seconds": compile_seconds,
    }
    row["times_ar"] = row["tokens_per_second"] / (found or [row])[0]["tokens_per_second"]
    found.append(timing.print_row(row))
  engine.use(measured)
  tokens, rate, texts = tune.answered(engine, some, arguments.new)
  row = {
    "rows": rows,
    "plan": "auto",
    "tokens_per_pass": tokens,
    "answered_per_second": rate,
    "same": _same(texts, answers),
    # As a whole: between plans there is no one step.
    "times_ar": rate / found[0]["answered_per_second"],
  }
  return [*found, timing.print_row(row)]


def _same(texts, answers) -> float:
  return float(np.mean([x == y for x, y in zip(texts, answers["ar"], strict=True)]))


def _choosing(rows: list[dict]) -> dict:
  """ "ROWS x TOKENS" -> what choosing adds to a step."""
  steps = {(row["rows"], row["plan"]): row.get("step_ms") for row in rows}
  return {
    f"{count} x {plan[7:]}": ms / steps[count, f"cycle:{plan[7:]}"] - 1
    for (count, plan), ms in steps.items()
    if plan.startswith("budget:") and steps.get((count, f"cycle:{plan[7:]}"))
  }


if __name__ == "__main__":
  timing.run(main)
