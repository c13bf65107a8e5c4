"""scripts/sample.py as its users run it: prompts in, answers out, and all that goes wrong."""

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sampler_fixtures

import refine_jax
from refine_jax.decoding import loading, result
from scripts import sample

SCRIPT = Path(__file__).parents[1] / "scripts" / "sample.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return sampler_fixtures.text_model_directory(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def model(directory):
  return refine_jax.load(directory)


@pytest.fixture
def run(directory, monkeypatch, capsys):
  def run(*arguments, given: bytes = b"", model=directory):
    """(exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--model={model}", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    with pytest.raises(SystemExit) as status:
      sample.main()
    printed = capsys.readouterr()
    return status.value.code or 0, printed.out, printed.err

  return run


PROMPTS = ["what is two", "a b c d", "the fox", "hello \u2028world", "4"]
GREEDY = {"max_new_tokens": 6}
SAMPLED = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}


def flags(options):
  return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_json_lines_in_and_out_whatever_the_batch(run, model, options, batch_size):
  messages = [{"role": "user", "content": PROMPTS[1]}]
  prompts = [PROMPTS[0], messages, *PROMPTS[2:4], [5, 6, 7]]
  given = "".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\r\n\n" for p in prompts)
  code, printed, notes = run(
    "--jsonl", f"--batch_size={batch_size}", *flags(options), given=given.encode()
  )
  want = refine_jax.generate(model, prompts, **options)
  answers = [json.loads(line) for line in printed.rstrip("\n").split("\n")]
  assert code == 0 and [a["prompt"] for a in answers] == prompts
  assert [a["text"] for a in answers] == want.texts
  assert [(a["tokens"], a["passes"], a["stopped"]) for a in answers] == [
    (len(t), p, s) for t, p, s in zip(want.tokens, want.passes, want.stopped, strict=True)
  ]
  assert f"[{sum(map(len, want.tokens))} tokens, {want.tokens_per_pass:.2f} a pass," in notes


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lines_of_text(run, model, tmp_path, batch_size):
  path = tmp_path / "prompts.txt"
  path.write_bytes(b"\xef\xbb\xbf" + "\n".join(PROMPTS).encode())
  code, printed, _ = run(f"--prompts_file={path}", f"--batch_size={batch_size}", *flags(GREEDY))
  texts = refine_jax.generate(model, PROMPTS, **GREEDY).texts
  assert code == 0 and printed == "".join(f"{text}\n---\n" for text in texts)


def test_one_prompt_streams(run, model, monkeypatch):
  pieces = []
  monkeypatch.setattr("builtins.print", lambda text="", **options: pieces.append((text, options)))
  code, _, _ = run("--prompt=what is two", *flags(GREEDY))
  stream = list(refine_jax.generate(model, ["what is two"], stream=True, **GREEDY))
  assert code == 0 and len(stream) > 1
  shown = [text for text, options in pieces if options == {"end": "", "flush": True}]
  assert shown == [piece for (piece,) in stream]


def test_a_page_of_several_batches_shows_all_answers(run, tmp_path):
  path, picture = tmp_path / "passes.html", tmp_path / "first.svg"
  code, _, _ = run(
    f"--html={path}",
    f"--svg={picture}",
    "--batch_size=2",
    *flags(GREEDY),
    given="\n".join(PROMPTS).encode(),
  )
  page = path.read_text(encoding="utf-8")
  assert code == 0 and "what is two" in picture.read_text(encoding="utf-8")
  assert [f"answer {n}:" in page for n in range(1, 7)] == [True] * 5 + [False]
  assert "hello ‹2028›world" in page


def test_joined_numbers_are_those_of_one_call(model):
  prompts, options = [[5], [6, 7], [8]], {"trace": True, "max_new_tokens": 9, "block_size": 4}
  whole = refine_jax.generate(model, prompts, **options)
  parts = [
    refine_jax.generate(model, prompts[:1], **options),
    refine_jax.generate(model, prompts[1:], first_row=1, **options),
  ]
  out = result.joined(parts)
  assert (out.prompts, out.tokens, out.texts) == (whole.prompts, whole.tokens, whole.texts)
  assert (out.passes, out.stopped) == (whole.passes, whole.stopped)
  assert [[p.tokens for p in row] for row in out.trace.rows] == [
    [p.tokens for p in row] for row in whole.trace.rows
  ]
  assert out.trace.pieces == whole.trace.pieces
  assert out.accepted == pytest.approx(whole.accepted)
  assert out.decode_seconds == sum(part.decode_seconds for part in parts)


def test_a_chat_keeps_its_turns_until_told_to_forget(run, model):
  code, printed, _ = run("--chat", *flags(GREEDY), given=b"the fox\n\na b\n/new\na b\n")
  say = lambda role, text: {"role": role, "content": text}  # noqa: E731
  turns = [say("user", "the fox")]
  first = refine_jax.generate(model, [turns], **GREEDY).texts[0]
  turns += [say("assistant", first), say("user", "a b")]
  second = refine_jax.generate(model, [turns], **GREEDY).texts[0]
  third = refine_jax.generate(model, ["a b"], **GREEDY).texts[0]
  assert second != third
  assert code == 0 and printed == f"{first}\n{second}\n{third}\n"


def test_an_interrupt_cuts_an_answer_of_a_chat_and_not_the_chat(run, model, monkeypatch):
  """What was said of it stays a turn."""
  pieces = [p for (p,) in refine_jax.generate(model, ["the fox"], stream=True, **GREEDY)]
  interrupted = []

  def show(text="", **options):
    written.append(str(text) + options.get("end", "\n"))
    if len(written) == 2:
      interrupted.append(signal.raise_signal(signal.SIGINT))

  written = []
  monkeypatch.setattr("builtins.print", show)
  code, _, _ = run("--chat", *flags(GREEDY), given=b"the fox\na b\n")
  said = "".join(pieces[:2])
  assert interrupted and len(pieces) > 2
  turns = [("user", "the fox"), ("assistant", said), ("user", "a b")]
  after = refine_jax.generate(model, [[{"role": r, "content": c} for r, c in turns]], **GREEDY)
  lines = [line for line in "".join(written).split("\n") if "a pass" not in line]
  assert code == 0 and lines[0] == said and after.texts[0] in "".join(written)


@pytest.mark.parametrize(
  "arguments, given, words",
  [
    ([], b"", "no prompt"),
    ([], b"\n \n", "no prompt"),
    ([], b'{"text": "a"}', "Line 1"),
    ([], b'{"prompt": null}', "Line 1"),
    ([], b'{"prompt": []}', "Prompt 1"),
    ([], b'{"prompt": [3, 100000]}', "vocabulary"),
    ([], b'{"prompt": [{"role": "user"}]}', "Prompt 1 is no prompt"),
    ([], b'{"prompt": "\\ud800"}', "Unicode"),
    ([], "\ufeffwhat\nis".encode("utf-16"), "UTF-8"),
    ([], b"fox \xff", "not valid Unicode"),
    (["--chat"], b"fox " * 2000, "leaves no room"),
    (["--chat"], b"\xff\xfe", "UTF-8"),
    (["--prompts_file=/nowhere"], b"", "not a file"),
    (["--prompt=a", "--prompts_file=x"], b"", "not both"),
    (["--chat", "--jsonl"], b"", "--jsonl"),
    (["--prompt=a", "--mode=fast"], b"", "exact, fixed, threshold, ar"),
    (["--prompt=a", "--draft=none"], b"", "tail, noise, ngram"),
    (["--prompt=a", "--block_size=0"], b"", "block_size"),
    (["--prompt=a", "--batch_size=0"], b"", "batch_size"),
    (["--prompt=a", "--temperature=-1"], b"", "temperature"),
    (["--prompt=a", "--temperature=nan"], b"", "temperature"),
    (["--prompt=a", "--top_p=0"], b"", "top_p"),
    (["--prompt=a", "--top_k=-1"], b"", "top_k"),
    (["--prompt=a", "--refine_iter=0"], b"", "refine_iter"),
    (["--prompt=a", "--tau=-0.1"], b"", "tau"),
    (["--prompt=a", "--seed=-1"], b"", "seed"),
    (["--prompt=a", "--stop="], b"", "stop string"),
    (["--prompt=a", "--dtype=int8"], b"", "bfloat16"),
    (["--prompt=a", "--check", "--temperature=1"], b"", "--temperature"),
  ],
)
def test_what_goes_wrong_is_one_line(run, arguments, given, words):
  code, printed, errors = run(*arguments, "--max_new_tokens=2", given=given)
  assert code == 1 and words in errors
  assert errors.startswith("error: ") and errors.count("\n") == 1
  assert not printed


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_prompt_that_cannot_be_answered_has_an_error_in_its_place(run, batch_size, as_json):
  bad = ['{"prompt": ', '{"prompt": [3, "x"]}', "fox " * 2000, '{"prompt": "\\ud800"}']
  lines = [bad[0], "what", bad[1], bad[2], "is", bad[3], "fox \udcff"]  # a byte that is no UTF-8
  words = ("Line 1", None, "Prompt 3", "Prompt 4 has", None, *["not valid Unicode"] * 2)
  more = ["--jsonl"] if as_json else []
  code, printed, errors = run(
    f"--batch_size={batch_size}",
    "--max_new_tokens=2",
    *more,
    given="\n".join(lines).encode(errors="surrogateescape"),
  )
  _, alone, _ = run("--max_new_tokens=2", *more, given=b"what\nis")
  entries, good = (
    out.splitlines() if as_json else out.split("\n---\n")[:-1] for out in (printed, alone)
  )
  assert code == 1 and "error: 5 of 7 prompts" in errors and len(entries) == len(lines)
  assert [e for e, word in zip(entries, words, strict=True) if word is None] == good
  for entry, word in zip(entries, words, strict=True):
    assert word is None or word in (json.loads(entry)["error"] if as_json else entry)


def test_a_model_without_a_chat_template_takes_the_users(run, model, directory, tmp_path):
  base = shutil.copytree(directory, tmp_path / "base")
  (base / "chat_template.jinja").unlink()
  for given in (b"a b\n", b'{"prompt": [{"role": "user", "content": "a"}]}\n'):
    code, printed, errors = run(given=given, model=base)
    assert (code, printed, errors.count("\n")) == (1, "", 1) and "--chat_template" in errors
  template = model.tokenizer.chat_template
  code, printed, _ = run("--prompt=a b", f"--chat_template={template}", *flags(GREEDY), model=base)
  assert code == 0 and printed == refine_jax.generate(model, ["a b"], **GREEDY).texts[0] + "\n"
  code, printed, _ = run("--jsonl", *flags(GREEDY), given=b'{"prompt": [5, 6]}', model=base)
  assert code == 0 and json.loads(printed)["prompt"] == [5, 6]  # ids go through no template


def test_a_second_chat_template_is_refused(run):
  code, _, errors = run("--prompt=a", "--chat_template={{ messages }}")
  assert code == 1 and "has a chat template" in errors


def test_what_is_no_text_in_an_unused_field_is_written_as_escapes(run):
  prompt = [{"role": "user", "content": "a", "name": "\ud800"}]
  given = json.dumps({"prompt": prompt}).encode()
  code, printed, _ = run("--jsonl", *flags(GREEDY), given=given)
  assert code == 0 and json.loads(printed)["prompt"] == prompt


def test_options_are_checked_before_the_model_is_loaded(run, monkeypatch):
  monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
  for wrong in ("--mode=fast", "--top_p=2", "--html=/", "--dtype=x"):
    code, _, _ = run("--prompt=a", wrong)
    assert code == 1


def start(directory, *arguments):
  return subprocess.Popen(
    [sys.executable, SCRIPT, f"--model={directory}", *arguments],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_reader_that_leaves_and_an_interrupt_end_quietly(directory):
  with start(directory, "--jsonl", "--batch_size=1", "--max_new_tokens=3") as left:
    left.stdin.write("what\n" * 100)
    left.stdin.close()
    assert json.loads(left.stdout.readline())["prompt"] == "what"
    left.stdout.close()
    assert (left.wait(60), sampler_fixtures.without_progress(left.stderr.read())) == (141, "")
  with start(directory, "--batch_size=1", "--mode=ar", "--temperature=9") as stopped:
    stopped.stdin.write("what\n" * 1000)
    stopped.stdin.close()
    stopped.stdout.readline()
    stopped.send_signal(signal.SIGINT)
    assert (stopped.wait(60), sampler_fixtures.without_progress(stopped.stderr.read())) == (
      130,
      "\n",
    )


def test_batches_with_blocks_of_their_own_are_joined(model):
  """A model trained with blocks has smaller ones by default where there are more rows."""
  parts = [
    refine_jax.generate(model, [[5], [6]], block_size=2, max_new_tokens=6),
    refine_jax.generate(model, [[7]], block_size=4, max_new_tokens=6),
  ]
  small, large = (sum(part.passes) for part in parts)
  accepted = result.joined(parts).accepted
  assert accepted[0] == 1.0 and len(accepted) == 4
  assert accepted[3] == pytest.approx(parts[1].accepted[3] * large / (small + large))
