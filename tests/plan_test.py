"""Plans: names of devices, programs read, times bounded, choices made for what is not here."""

import json

import jax
import pytest
from config_fixtures import ROOT, changed

from benchmarks import timing
from refine_jax import sharding, target
from refine_jax.config import MeshConfig
from refine_jax.errors import UserError
from refine_jax.planning import advice, collectives, command, devices, memory, program, projection

PROGRAM = """\
HloModule step

%turn (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = bf16[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %x)
}

%limit (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %l = pred[] compare(%i, %c), direction=LT
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %x)
}

%asked (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

%started (p: f32[8,4]) -> f32[8,4] {
  ROOT %a = f32[8,4]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%limit, body=%turn
  %v = (s32[], f32[8,4]) while(%t), condition=%asked, body=%inner
  %k = (s32[], f32[8,4]) while(%t), condition=%asked, body=%turn, TRIPS
  %s = ((f32[2,4]), f32[8,4]) all-gather-start(%a), replica_groups=mesh['data'=2,'fsdp'=4] {'data'}
  %b = ((f32[8,4]), f32[8,4], u32[]) async-start(%a), calls=%started
  %c = f32[8,4] async-done(%b), calls=%started
  %p = f32[8,4] collective-permute(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %r = (f32[8,4], f32[3]) all-reduce(%a, %d), replica_groups={}, NAMED
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}').replace(
  "NAMED", 'to_apply=%add, metadata={op_name="sum"}'
)


def test_what_a_program_sends_is_read_with_its_loops_and_groups():
  halves, columns = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
  found = [(x.kind, x.bytes, x.runs, x.total, x.groups, x.name) for x in collectives.read(PROGRAM)]
  assert found == [
    ("all-gather", 64, 5, 320, halves, ""),
    ("reduce-scatter", 32, None, 32, columns, ""),
    ("all-gather", 64, 3, 192, halves, ""),
    ("all-gather", 128, 1, 128, columns, ""),
    ("all-to-all", 128, 1, 128, halves, ""),
    ("collective-permute", 128, 1, 128, (), ""),
    ("all-reduce", 140, 1, 140, (), "sum"),
  ]


def test_what_is_sent_takes_the_time_of_its_slowest_way():
  kind = devices.KINDS["h100"]

  def seconds(name, size, group):
    one = collectives.Collective(name, (("f32", (size // 4,)),), 2, (group,), "")
    (sent,) = projection.traffic([one], kind, 16)
    assert (sent.count, sent.bytes) == (2, 2 * size)
    return sent.seconds / 2

  gib, inside, across = 2**30, tuple(range(8)), tuple(range(16))
  assert seconds("all-gather", gib, inside) == pytest.approx(gib * 7 / 8 / 450e9)
  assert seconds("all-reduce", gib, inside) == pytest.approx(2 * gib * 7 / 8 / 450e9)
  assert seconds("reduce-scatter", gib, inside) == pytest.approx(7 * gib / 450e9)
  # Half of it comes from the other host, through eight ports: less than what neighbours send.
  assert seconds("all-gather", gib, across) == pytest.approx(gib * 15 / 16 / 450e9)
  # Through one port it is what takes longest.
  assert seconds("all-gather", gib, (0, 8)) == pytest.approx(gib / 2 / 50e9)
  assert seconds("all-reduce", gib, (0, 8)) == pytest.approx(gib / 50e9)


def test_a_projection_lies_between_nothing_and_all_hidden():
  sent = [projection.Traffic("all-gather", 8, 1, 1, 1, 0.25, True)]
  got = projection.project(1000, 1e12, sent, peak=2e12, efficiency=0.5)
  assert (got.arithmetic, got.between, got.bound) == (1.0, 0.25, "arithmetic")
  assert (got.slowest, got.fastest) == (800.0, 1000.0)


@pytest.mark.parametrize(
  "name, message",
  [
    ("b100:8", "is not known; name one such as h100:8, v5e:2x4"),
    ("h100:2x4", "h100 takes A devices"),
    ("h100:12", "name a multiple of 8"),
    ("v5e:8", "v5e takes AxB devices"),
    ("v5p:2x0x2", "v5p takes AxBxC devices"),
    ("", "is not known"),
  ],
)
def test_a_name_of_no_devices_is_refused(name, message):
  with pytest.raises(UserError, match=message):
    devices.parse(name)


@pytest.mark.parametrize("name, what", [("h100:8", "JAX's CUDA plugin"), ("v5e:2x4", "libtpu")])
def test_what_is_not_installed_is_named(monkeypatch, name, what):
  monkeypatch.setattr(devices, "is_installed", lambda wanted: False)
  with pytest.raises(UserError, match=rf"needs {what}, .* pip install -e '\.\[plan\]'\."):
    devices.find(devices.parse(name))


def chosen(name: str, **optim):
  """The step of SmolLM2-135M's shape, its choices made for such a device."""
  config = changed("optim.batch_size", 8)
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with target.compiling_for(devices.parse(name).target):
    return program.make_step(config, timing.SHAPES["135m"].model, mesh, program.Rows(2048, 4))


def test_choices_are_made_for_the_device_that_is_named():
  found = {name: chosen(name).forward for name in ("h100:1", "v5e:1x1", "cpu:1")}
  attention = {name: forward.attention for name, forward in found.items()}
  assert attention == {"h100:1": "cudnn_packed", "v5e:1x1": "splash", "cpu:1": "xla"}
  # For a TPU unrolled layers take minutes to compile.
  assert {name: f.unroll for name, f in found.items()} == {"h100:1": 30, "v5e:1x1": 1, "cpu:1": 1}
  # 16 GB hold less than 80.
  assert found["h100:1"].remat == "none" != found["v5e:1x1"].remat
  assert target.named() is None


def test_what_does_not_fit_says_what_would_help():
  step = chosen("v5e:1x1")
  held = memory.Memory(2**30, 2**31, 0, 15 * 2**30, 18 * 2**30, 16 * 2**30)
  assert held.fits is False
  found = advice.where_it_does_not_fit(changed("optim.batch_size", 8), step, held)
  assert found[0].startswith("config.optim.accumulation=2: 4 instead of 8 rows")
  assert any(x.startswith("config.model.remat=") for x in found)


def test_the_command_says_what_a_step_takes(tmp_path, capsys):
  values = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
  }
  (tmp_path / "config.json").write_text(json.dumps(values))
  arguments = [
    "plan",
    f"--config={ROOT}/configs/tiny.py",
    "--device=cpu:4",
    f"--config.model.config={tmp_path}",
    "--config.data.max_length=32",
    "--config.optim.accumulation=2",
    "--decode_rows=1",
    "--decode_places=256",
    "--json",
  ]
  assert command.main(arguments) == 0
  *lines, last = capsys.readouterr().out.splitlines()
  got = json.loads(last)
  matrices = 2 * (32 * (4 + 2 + 2 + 4) * 8 + 3 * 32 * 48) + 64 * 32
  parameters = matrices + 64 * 32 + 5 * 32  # the embedding, norms
  assert got["parameters"] == parameters and got["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
  assert got["memory"]["parameters"] == 4 * parameters
  assert 8 * parameters <= got["memory"]["optimizer"] <= 8 * parameters + 16
  (sent,) = got["collectives"]
  # The gradients once, whatever the turns.
  assert sent["kind"] == "all-reduce" and 4 * parameters <= sent["bytes"] < 4.2 * parameters
  assert got["decode"]["parameter_bytes"] == 4 * parameters
  tokens = 16 * 32 / 4  # of a device; two rounds, each forward and twice that backward
  assert got["flops"]["model"] == pytest.approx(tokens * 2 * 3 * (2 * matrices + 2 * 2 * 32 * 8))
  assert any(x.startswith("memory        0.00 GiB of parameters") for x in lines)
  with pytest.raises(UserError, match="--device is missing"):
    command.main([x for x in arguments if "device" not in x])
