"""The adapter for EleutherAI's harness, against transformers and on a task of our own."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hf_fixtures import tiny_hf_model, words_tokenizer

from refine_jax.errors import UserError
from refine_jax.evaluation import harness_options
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
  """Log-probability of each token after the first, and whether it is the likeliest: [T - 1]."""
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


@pytest.fixture
def unloaded(monkeypatch):
  """Loading a model fails the test: what is refused is refused before."""

  def load(*arguments, **options):
    raise AssertionError("a model was loaded")

  monkeypatch.setattr(adapter.loading, "load", load)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"blok_size": 4}, "blok_size is not known; do you mean block_size?"),
    ({"max_length": 16}, "max_length is not known"),
    ({"trust_remote_code": True}, "trust_remote_code is not known"),
    ({"temperature": 1.0}, "temperature belongs into --gen_kwargs"),
    ({"mode": "fast"}, "mode='fast' cannot be"),
    ({"block_size": 0}, "block_size=0 cannot be"),
    ({"batch_size": 0}, "batch_size=0 cannot be"),
    ({"batch_size": "many"}, "batch_size='many' cannot be"),
    ({"batch_size": 2.5}, "batch_size=2.5 cannot be"),
    ({"max_gen_toks": -1}, "max_gen_toks=-1 cannot be"),
    ({"device": "tpu"}, "--device tpu is not what JAX runs on here"),
    ({"pretrained": None}, "needs pretrained=DIR"),
    ({"mode": "threshold", "tau": "high"}, "tau='high' cannot be; it must be a probability"),
  ],
)
def test_model_arguments_that_cannot_be_are_refused_before_a_model_is_loaded(
  unloaded, arguments, message
):
  with pytest.raises(UserError, match=re.escape(message)):
    adapter.RefineLM(**{"pretrained": "nowhere"} | arguments)


def test_an_automatic_batch_size_is_a_number_within_the_largest():
  read = harness_options.read_batch_size
  assert read("auto") == read("auto:4") == harness_options.BATCH_SIZE
  assert read("auto", 3) == read("auto", "3") == read("3") == read(3) == 3


@pytest.mark.parametrize(
  "given, want",
  [
    ({}, {"stop": [], "max_new_tokens": 7, "temperature": 0.0}),
    *(({name: 5}, {"max_new_tokens": 5}) for name in ("max_gen_toks", "max_new_tokens")),
    *(({name: "5"}, {"max_new_tokens": 5}) for name in ("max_tokens", "max_completion_tokens")),
    ({"max_gen_toks": None, "max_tokens": 5}, {"max_new_tokens": 5}),
    ({"until": "w"}, {"stop": ["w"]}),
    ({"until": ["w", ""]}, {"stop": ["w"]}),
    ({"until": None}, {"stop": []}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"temperature": None, "do_sample": None}, {"temperature": 0.0}),
    ({"do_sample": True, "top_p": 0.5, "top_k": 3}, {"top_p": 0.5, "top_k": 3}),
    ({"top_p": None, "top_k": -1}, {"top_k": 0}),
    ({"num_beams": 1}, {}),
  ],
)
def test_generation_arguments_are_read_by_all_their_names(given, want):
  got = harness_options.read_gen_kwargs(given, 7)
  assert got | want == got


@pytest.mark.parametrize(
  "given, message",
  [
    ({"num_beams": 4}, "num_beams=4 is not supported"),
    ({"min_p": 0.1}, "min_p=0.1 is not supported"),
    ({"max_gen_toks": 0}, "max_gen_toks=0"),
    ({"max_tokens": "many"}, "max_tokens='many'"),
    ({"until": [5]}, "until=[5]"),
    ({"do_sample": "yes"}, "do_sample='yes'"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"temperature": -1}, "temperature=-1.0"),
    ({"top_p": 0}, "top_p=0.0"),
    ({"top_k": 1.5}, "top_k=1.5"),
  ],
)
def test_generation_arguments_that_cannot_be_are_refused_before_any_model_call(
  ours, monkeypatch, given, message
):
  monkeypatch.setattr(adapter, "Call", None)
  requests = [request("w5", {"until": []}), request("w5", {"until": []} | given)]
  with pytest.raises(UserError, match=re.escape(message)):
    ours.generate_until(requests, disable_tqdm=True)


def test_the_command_refuses_generation_arguments_before_a_model_is_loaded(
  unloaded, monkeypatch, capsys
):
  command = ["lm_eval", "--model=refine_jax", "--model_args=pretrained=x", "--tasks=gsm8k"]
  monkeypatch.setattr("sys.argv", [*command, "--gen_kwargs", "num_beams=4"])
  with pytest.raises(SystemExit) as ended:
    adapter.main()
  assert ended.value.code == 1
  assert "error: The generation argument num_beams=4" in capsys.readouterr().err


def test_an_answer_as_long_as_the_model_leaves_the_prompt_half_of_it(ours, theirs):
  """The model has 256 positions; the prompt keeps all its 20 tokens, and a long one its end."""
  rng = np.random.default_rng(4)
  short, long = words(rng, 20), words(rng, 300)
  seen = []

  def call(model, requests, *, slots):
    seen.extend(one.prompt for one in requests)
    return types.SimpleNamespace(busy=False)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(adapter, "Call", call)
    requests = [request(c, {"until": [], "max_gen_toks": 256}) for c in (short, long)]
    ours.generate_until(requests, disable_tqdm=True)
  assert seen == [ids(short), ids(long)[-128:]]


def test_special_tokens_that_a_tokenizer_appends_never_end_a_context(ours, theirs):
  tokenizer = words_tokenizer()
  tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="w2 $A </s>", special_tokens=[("w2", 2), ("</s>", 1)]
  )
  assert tokenizer.encode("w5") == [2, 5, 1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ours, "tokenizer", tokenizer)
    patch.setattr(ours, "_prefix", adapter.prefix_ids(tokenizer))
    assert ours.tok_encode("w5 w6") == [2, 5, 6]
    assert ours.tok_encode("w5 w6", add_special_tokens=False) == [5, 6]
    ((value, _),) = ours.loglikelihood([request("w5 w6", " w7")], disable_tqdm=True)
  want, _ = log_probabilities(theirs, [2, 5, 6, 7])
  assert value == pytest.approx(want[-1], abs=1e-3)


def test_a_loglikelihood_that_is_not_finite_names_its_request(ours):
  params = dict(ours.model.params)
  params["embedding"] = params["embedding"].at[7].set(np.nan)
  broken = dataclasses.replace(ours.model, params=params)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ours, "model", broken)
    requests = [request("w5 w6", " w8"), request("w7 w6", " w9")]
    with pytest.raises(UserError, match=r"Request \d \('w. w6' -> ' w.'; 2 and 1 tokens\) .* nan"):
      ours.loglikelihood(requests, disable_tqdm=True)


def test_rows_without_a_context_or_anything_end_no_evaluation(ours):
  whole, empty, alone = ours.loglikelihood(
    [request("w5", " w6"), request("", ""), request("", "w6")], disable_tqdm=True
  )
  assert empty == (0.0, True) and whole[0] < 0 and alone[0] < 0
  assert ours.loglikelihood([request("", "")], disable_tqdm=True) == [(0.0, True)]
  kinds = {"until": [], "max_gen_toks": 2}
  texts = ours.generate_until([request("", kinds), request("w5", kinds)], disable_tqdm=True)
  (prefix,) = ours.tokenizer.convert_ids_to_tokens([ours.prefix_token_id])
  begun = ours.generate_until([request(prefix, kinds)], disable_tqdm=True)
  assert len(texts) == 2 and texts[0] == begun[0]


def test_two_names_for_the_number_of_new_tokens_are_said(caplog):
  got = harness_options.read_gen_kwargs({"max_new_tokens": 5, "max_gen_toks": 3}, 7)
  assert got["max_new_tokens"] == 3
  assert "Of max_gen_toks=3, max_new_tokens=5 max_gen_toks counts" in caplog.text
