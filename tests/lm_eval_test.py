"""The adapter for EleutherAI's harness, against transformers and on a task of our own."""

import json
import types

import numpy as np
import pytest
import torch
import transformers
from hf_fixtures import tiny_hf_model, words_tokenizer

from refine_jax.evaluation import lm_eval as adapter

TASK = """
task: weekdays
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A random model whose tokens are words w3, w4, .."""
  directory, _ = tiny_hf_model("llama", tmp_path_factory.mktemp("lm_eval"))
  tokenizer = words_tokenizer()
  tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
  tokenizer.save_pretrained(directory)
  return directory


@pytest.fixture(scope="module")
def ours(directory):
  return adapter.RefineLM(str(directory), batch_size=3, block_size=4)


@pytest.fixture(scope="module")
def theirs(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(directory)


def request(*arguments):
  return types.SimpleNamespace(args=arguments)


def ids(text):
  return [int(word[1:]) for word in text.split()]


def words(rng, count):
  return " ".join(f"w{i}" for i in rng.integers(3, 61, count))


def log_probabilities(model, tokens):
  """Of each token after the first, and whether it is the likeliest: float64 [T - 1]."""
  with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0].double()
  table = torch.log_softmax(logits, -1)[:-1]
  return table[range(len(tokens) - 1), tokens[1:]].numpy(), table.argmax(-1).numpy()


def test_loglikelihoods_are_those_of_transformers(ours, theirs):
  rng = np.random.default_rng(0)
  pairs = [(words(rng, n), " " + words(rng, m)) for n, m in [(3, 1), (9, 4), (1, 2), (30, 9)]]
  # One that is greedy: the model's own continuation.
  start = words(rng, 5)
  own = theirs.generate(torch.tensor([ids(start)]), max_new_tokens=3, do_sample=False)[0, 5:]
  pairs.append((start, " " + " ".join(f"w{i}" for i in own.tolist())))
  got = ours.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
  for (context, answer), (value, greedy) in zip(pairs, got, strict=True):
    tokens = ids(context) + ids(answer)
    want, best = log_probabilities(theirs, tokens)
    count = len(ids(answer))
    assert value == pytest.approx(want[-count:].sum(), abs=1e-3)
    assert greedy == (best[-count:] == tokens[-count:]).all()
  assert [g for _, g in got] == [False] * 4 + [True]


def test_an_empty_context_is_the_end_token(ours, theirs):
  ((value, _),) = ours.loglikelihood([request("", "w5 w6")], disable_tqdm=True)
  assert value == pytest.approx(log_probabilities(theirs, [1, 5, 6])[0].sum(), abs=1e-3)


def test_rolling_windows_cover_a_text_longer_than_the_model(ours, theirs):
  text = words(np.random.default_rng(1), 300)  # the model has 256 positions
  (value,) = ours.loglikelihood_rolling([request(text)], disable_tqdm=True)
  tokens = [1, *ids(text)]
  first = log_probabilities(theirs, tokens[:257][:256])[0].sum()
  assert value < first
  # The last window is filled up with the text before it, of which nothing is counted twice.
  windows = log_probabilities(theirs, tokens[-257:][:-1])[0]
  assert len(windows) == 255 and np.isfinite(value)
  short = words(np.random.default_rng(2), 20)
  (value,) = ours.loglikelihood_rolling([request(short)], disable_tqdm=True)
  assert value == pytest.approx(log_probabilities(theirs, [1, *ids(short)])[0].sum(), abs=1e-3)


def test_generation_stops_where_the_task_says(ours, theirs):
  rng = np.random.default_rng(3)
  contexts = [words(rng, n) for n in (4, 7, 2, 5)]
  greedy = []
  for context in contexts:
    prompt = torch.tensor([ids(context)])
    out = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=1)
    greedy.append([f"w{i}" for i in out[0, prompt.shape[1] :].tolist() if i > 2])
  stop = greedy[0][3]
  requests = [request(c, {"until": [stop], "max_gen_toks": 12}) for c in contexts[:3]]
  requests.append(request(contexts[3], {"until": [], "max_gen_toks": 5}))
  got = ours.generate_until(requests, disable_tqdm=True)
  for text, want in zip(got[:3], greedy, strict=False):
    assert text.split() == " ".join(want).split(stop)[0].split()
  assert got[3].split() == greedy[3][:5]


def test_samples_of_one_context_differ_from_batch_to_batch(ours):
  options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
  requests = [request("w5 w6 w7", options) for _ in range(2 * ours.batch_size)]
  assert len(set(ours.generate_until(requests, disable_tqdm=True))) > ours.batch_size


@pytest.mark.filterwarnings("ignore")  # the harness's own, and its data sets library's
def test_the_command_runs_a_local_task(directory, tmp_path, monkeypatch, capsys):
  rows = [{"question": f"w{i} w{i + 1}", "answer": "w5"} for i in range(5, 9)]
  data = tmp_path / "test.json"
  data.write_text("\n".join(map(json.dumps, rows)))
  more = 'generation_kwargs: {until: ["w9"], max_gen_toks: 4}'
  task = TASK.format(data=data, kind="generate_until", metric="exact_match", more=more)
  (tmp_path / "tasks").mkdir()
  (tmp_path / "tasks" / "weekdays.yaml").write_text(task)
  monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
  monkeypatch.setattr(
    "sys.argv",
    [
      "lm_eval",
      "--model",
      "refine_jax",
      "--model_args",
      f"pretrained={directory},block_size=4",
      "--tasks",
      "weekdays",
      "--include_path",
      str(tmp_path / "tasks"),
      "--output_path",
      str(tmp_path / "out"),
      "--batch_size",
      "2",
    ],
  )
  with pytest.raises(SystemExit) as ended:
    adapter.main()
  assert not ended.value.code
  (written,) = (tmp_path / "out").rglob("results_*.json")
  result = json.loads(written.read_text())["results"]["weekdays"]
  assert any(key.startswith("exact_match") for key in result)
