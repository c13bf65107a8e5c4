"""Uploads to a stand-in of the hub, and what transformers then loads from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
from adapter_fixtures import AdapterRun

from refine_jax.errors import UserError
from refine_jax.hf import push

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hub():
  hub = hub_server.Hub()
  with hub.served() as address:
    hub.address = address
    yield hub


@pytest.fixture
def api(hub, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  return huggingface_hub.HfApi(endpoint=hub.address, token=hub_server.TOKEN)


@pytest.fixture
def release(tmp_path):
  directory = tmp_path / "release"
  (directory / "custom_generate").mkdir(parents=True)
  (directory / "README.md").write_text("---\ntags:\n- custom_generate\n---\n")
  (directory / "model.safetensors").write_bytes(bytes(range(256)) * 40)
  (directory / "custom_generate" / "generate.py").write_text("pass\n")
  return directory


def test_every_file_arrives_in_one_commit(hub, api, release):
  address = push.push(release, "me/one", private=True, message="Step 7", api=api)
  found = hub.repositories["me/one"]
  assert address == f"{hub.address}/me/one"
  files = {str(p.relative_to(release)): p.read_bytes() for p in release.rglob("*") if p.is_file()}
  assert found == {"private": True, "commits": ["Step 7"], "files": files}
  push.push(release, "me/one", message="Step 9", api=api)  # it is there now
  assert found["commits"] == ["Step 7", "Step 9"]


def test_what_the_hub_refuses_is_one_line_and_the_release_stays(hub, api, release, monkeypatch):
  wrong = huggingface_hub.HfApi(endpoint=hub.address, token="hf_wrong")
  away = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_right")
  for use, said in ((wrong, "401; log in with"), (away, "refused")):
    with pytest.raises(UserError, match="is whole, and could not be uploaded") as error:
      push.push(release, "me/two", api=use)
    assert said in str(error.value) and "\n" not in str(error.value)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
    push.push(release, "me/two", api=api)
  assert (release / "README.md").exists() and "me/two" not in hub.repositories


@pytest.mark.parametrize("name", ["mine", "me/a/b", "me/", "/a", "me/a b", "me/" + "x" * 200])
def test_a_name_without_an_owner_is_refused_by_its_option(name):
  with pytest.raises(UserError, match="--push_to_hub=.* must be owner/name"):
    push.check_name(name, "--push_to_hub")


_READ = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("me/gated")
inputs = {"input_ids": torch.tensor([[5, 9, 30]]), "max_new_tokens": 12, "do_sample": False}
code = {"custom_generate": "me/gated", "trust_remote_code": True}
print(json.dumps([model.generate(**inputs, **x).tolist() for x in ({}, code)]))
"""


@pytest.mark.slow
def test_an_uploaded_run_decodes_from_the_hub(hub, tmp_path):
  """The script uploads, and transformers fetches weights, adapter and code from the hub."""
  run = AdapterRun(tmp_path, "gated", "llama")
  environment = os.environ | {
    "HF_ENDPOINT": hub.address,
    "HF_TOKEN": hub_server.TOKEN,
    "HF_HOME": str(tmp_path / "cache"),
    "HF_HUB_OFFLINE": "0",
    "TRANSFORMERS_OFFLINE": "0",
  }
  script = [sys.executable, ROOT / "scripts" / "export_hf.py", f"--workdir={run.workdir}"]
  script += [f"--output={tmp_path / 'out'}", "--push_to_hub=me/gated", "--private"]
  done = subprocess.run(script, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.splitlines()[-1] == f"{tmp_path / 'out'} -> {hub.address}/me/gated"
  assert "adapter/adapter_model.safetensors" in hub.repositories["me/gated"]["files"]
  read = [sys.executable, "-c", _READ]
  done = subprocess.run(read, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-2000:]
  plain, parallel = json.loads(done.stdout)
  assert plain == parallel and len(plain[0]) > 3
