"""Which files of a directory are the weights, and which of them are refused, by whoever made it."""

import json
import os
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hf_fixtures import tiny_hf_model

from refine_jax.decoding import loading
from refine_jax.errors import UserError
from refine_jax.hf import config as hf_config
from refine_jax.hf import export as hf_export
from refine_jax.hf import weights as hf_weights
from refine_jax.hf.shards import all_finite

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  directory, _ = tiny_hf_model("llama", tmp_path_factory.mktemp("shards"))
  return directory


@pytest.fixture
def directory(original, tmp_path):
  return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="module")
def tensors(original):
  return safetensors.numpy.load_file(original / "model.safetensors")


def read(directory):
  return hf_weights.load_params(directory, hf_config.read_model_config(directory))


def refusal(directory) -> str:
  with pytest.raises(UserError) as error:
    read(directory)
  return str(error.value)


def write(tensors, path):
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def write_shards(directory, tensors):
  """Two files with half of the tensors each, and no index."""
  names = sorted(tensors)
  write({n: tensors[n] for n in names[:9]}, directory / FIRST)
  write({n: tensors[n] for n in names[9:]}, directory / SECOND)


def write_index(directory, names, place=lambda i: FIRST if i < 9 else SECOND):
  parts = {n: place(i) for i, n in enumerate(sorted(names))}
  (directory / INDEX).write_text(json.dumps({"weight_map": parts}))


@pytest.mark.parametrize("others", ["shards", "shards with an index", "another file"])
def test_model_safetensors_goes_before_all_other_files(others, directory, original, tensors):
  old = {name: 0 * x for name, x in tensors.items()}
  if others == "another file":
    write(old, directory / "model_ema.safetensors")
  else:
    write_shards(directory, old)
  if others == "shards with an index":
    write_index(directory, old)
  jax.tree.map(np.testing.assert_array_equal, read(directory), read(original))


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_model_with_and_without_their_index(index, directory, original, tensors):
  (directory / "model.safetensors").unlink()
  write_shards(directory, tensors)
  if index:
    write_index(directory, tensors)
  jax.tree.map(np.testing.assert_array_equal, read(directory), read(original))


def test_an_index_leaves_files_that_it_does_not_name(directory, original, tensors):
  (directory / "model.safetensors").unlink()
  write_shards(directory, tensors)
  write_index(directory, tensors)
  write({name: 0 * x for name, x in tensors.items()}, directory / "model_ema.safetensors")
  jax.tree.map(np.testing.assert_array_equal, read(directory), read(original))


@pytest.mark.parametrize("index", [True, False])
def test_a_tensor_in_two_files_is_an_error_that_names_both(index, directory, tensors):
  (directory / "model.safetensors").unlink()
  write_shards(directory, tensors)
  names = sorted(tensors)
  write({n: tensors[n] for n in names[8:]}, directory / SECOND)
  if index:
    write_index(directory, tensors)
  message = refusal(directory)
  assert all(part in message for part in (names[8], FIRST, SECOND))


@pytest.mark.parametrize(
  ("dtype", "named"),
  [
    ("float8_e4m3fn", "F8_E4M3"),
    ("float8_e5m2", "F8_E5M2"),
    ("int8", "I8"),
    ("int64", "I64"),
    ("bool", "BOOL"),
    ("complex64", "C64"),
  ],
)
def test_a_tensor_that_is_no_float_of_ours_is_named_with_its_dtype(dtype, named, directory):
  path = directory / "model.safetensors"
  there = safetensors.torch.load_file(path)
  there[QUERY] = there[QUERY].to(getattr(torch, dtype))
  safetensors.torch.save_file(there, path)
  message = refusal(directory)
  assert f"{QUERY} ({named})" in message
  assert len(message) < 500


def test_wider_floats_are_narrowed_and_narrower_ones_of_one_stack_widened(directory, original):
  path = directory / "model.safetensors"
  there = safetensors.torch.load_file(path)
  there["model.norm.weight"] = there["model.norm.weight"].double()
  there[QUERY] = there[QUERY].bfloat16()
  safetensors.torch.save_file(there, path)
  params, want = read(directory), read(original)
  np.testing.assert_array_equal(params["final_norm"]["scale"], want["final_norm"]["scale"])
  kernels = (tree["layers"]["attention"]["query"]["kernel"] for tree in (params, want))
  got, whole = kernels
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got[0], whole[0])
  np.testing.assert_array_equal(got[1], whole[1].astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad, directory, tensors):
  changed = {name: x.copy() for name, x in tensors.items()}
  changed[QUERY][3, 4] = bad
  write(changed, directory / "model.safetensors")
  message = refusal(directory)
  assert QUERY in message and "not finite" in message


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_finite_is_what_numpy_calls_finite(dtype):
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 256, (400, 3, np.dtype(dtype).itemsize), np.uint8)
  for array in (*bits.view(dtype), np.full((3, 100_000), np.finfo(np.float16).max, dtype).T):
    with np.errstate(invalid="ignore"):  # bfloat16's own way of looking at a signalling NaN
      want = bool(np.isfinite(array).all())
    assert all_finite(array) == want
  assert all_finite(np.zeros((0, 3), dtype))


def test_an_export_that_would_overflow_its_dtype_is_refused(directory, tmp_path):
  params = read(directory)
  params["final_norm"]["scale"] = params["final_norm"]["scale"] + np.float32(1e5)
  with pytest.raises(UserError, match="model.norm.weight holds values that are not finite"):
    hf_export.export(params, directory, tmp_path / "out", dtype="float16")
  assert not (tmp_path / "out").exists()
  hf_export.export(params, directory, tmp_path / "out", dtype="bfloat16")


def test_long_lists_are_cut_and_their_prefix_is_said(directory, tensors):
  adapter = {f"base_model.model.{name}": x for name, x in tensors.items()}
  write(adapter, directory / "model.safetensors")
  message = refusal(directory)
  assert len(message) < 1000 and f"{2 * len(tensors)} problems" in message
  assert f"and {len(tensors) - 4} more (all under base_model.model)" in message
  assert "The files have 'base_model.model.' before each name" in message


def test_names_without_the_models_prefix_are_told_so(directory, tensors):
  write({n.removeprefix("model."): x for n, x in tensors.items()}, directory / "model.safetensors")
  assert "The files lack 'model.' before each name" in refusal(directory)


def test_names_of_a_hostile_file_are_escaped_and_cut(directory, tensors):
  names = {"\x1b[31mred\x07": 0, "\u202egnp": 0, "n" * 5000: 0}
  write(tensors | {n: np.zeros(1, np.float32) for n in names}, directory / "model.safetensors")
  message = refusal(directory)
  assert message.isprintable() and len(message) < 1500
  assert "\\x1b[31mred\\x07" in message and "\\u202egnp" in message and "5001 characters" in message


@pytest.mark.parametrize(
  "name",
  [
    "../secret/model.safetensors",
    "/dev/zero",
    "sub/model.safetensors",
    "..",
    "",
    "config.json",
    "a\x00.safetensors",
    "m" * 5000 + ".safetensors",
    None,
    3,
    [FIRST],
    {"a": FIRST},
    True,
  ],
)
def test_an_index_names_files_of_its_own_directory_only(name, directory, tensors, tmp_path):
  (tmp_path / "secret").mkdir()
  (directory / "sub").mkdir()
  for place in (tmp_path / "secret", directory / "sub"):
    shutil.copy(directory / "model.safetensors", place / "model.safetensors")
  (directory / "model.safetensors").unlink()
  write_index(directory, tensors, lambda i: name)
  message = refusal(directory)
  assert "index" in message and len(message) < 1500


@pytest.mark.parametrize("weight_map", [None, [], {}, "a", 3])
def test_an_index_without_a_map_is_one_line(weight_map, directory):
  (directory / "model.safetensors").unlink()
  (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  assert "weight_map" in refusal(directory)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, FIRST, "config.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(name, directory, tensors):
  (directory / "model.safetensors").unlink()
  if name == FIRST:
    write_index(directory, tensors, lambda i: FIRST)
  (directory / name).unlink(missing_ok=True)
  os.mkfifo(directory / name)
  assert str(directory) in refusal(directory)


def test_links_to_files_elsewhere_are_read_as_in_the_hubs_cache(directory, original, tmp_path):
  blobs = tmp_path / "blobs"
  blobs.mkdir()
  for i, path in enumerate(sorted(directory.iterdir())):
    path.rename(blobs / str(i))
    path.symlink_to(f"../blobs/{i}")
  jax.tree.map(np.testing.assert_array_equal, read(directory), read(original))


class Touch:
  """Unpickled, it makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def test_no_code_of_a_directory_is_run(directory, tmp_path):
  mark = tmp_path / "ran"
  for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
    (directory / name).write_bytes(pickle.dumps(Touch(mark)))
  (directory / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')")
  (directory / "tokenization_x.py").write_text(f"open({str(mark)!r}, 'w')")
  tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
  (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
  with pytest.raises(UserError):
    loading.load(directory)  # its tokenizer needs code
  (directory / "tokenizer_config.json").unlink()
  loading.load(directory)
  config = json.loads((directory / "config.json").read_text())
  config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
  (directory / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="auto_map"):
    loading.load(directory)
  assert not mark.exists()
