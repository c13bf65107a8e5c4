"""What to change in a run that does not fit its devices."""

from refine_jax import sharding
from refine_jax.config import Config, MeshConfig
from refine_jax.model import remat
from refine_jax.planning.memory import Memory
from refine_jax.planning.program import Step
from refine_jax.training import choices


def where_it_does_not_fit(config: Config, step: Step, memory: Memory) -> list[str]:
  """Keys to change, those first that cost least, each with what it does."""
  mesh, found = step.mesh, []
  staying = memory.parameters + memory.optimizer + memory.base
  assert memory.room is not None
  rows = config.optim.micro_batch // sharding.batch_shards(mesh)
  if mesh.shape["data"] > 1 and staying > memory.room / 4:
    fsdp = mesh.shape["data"] * mesh.shape["fsdp"]
    split = staying_bytes(step, MeshConfig(data=1, fsdp=fsdp, tensor=mesh.shape["tensor"]))
    found.append(
      f"config.mesh.data=1 config.mesh.fsdp={fsdp}: what stays on a device becomes"
      f" {split / 2**30:.1f} instead of {staying / 2**30:.1f} GiB"
    )
  if rows > 1:
    divisor = next(n for n in range(2, rows + 1) if rows % n == 0)
    found.append(
      f"config.optim.accumulation={config.optim.accumulation * divisor}: {rows // divisor} instead"
      f" of {rows} rows of a device at a time, the same result"
    )
  later = [*remat.POLICIES][[*remat.POLICIES].index(step.forward.remat) + 1 :]
  if later:
    found.append(
      f"config.model.remat={later[0]}: less is kept for the backward pass, more computed"
    )
  if staying > 0.8 * memory.room and mesh.shape["data"] == 1:
    found.append(
      f"more devices in config.mesh.fsdp: {staying / 2**30:.1f} GiB of parameters and optimizer"
      " stay on each"
    )
  if config.optim.moment_dtype == "float32" and memory.optimizer > memory.room / 8:
    found.append("config.optim.moment_dtype=bfloat16: a quarter less of the optimizer's memory")
  if rows == 1:
    found.append("config.data.max_length: each device has one row at a time already")
  return found


def staying_bytes(step: Step, mesh: MeshConfig) -> int:
  """Bytes that stay on a device with another mesh over the same devices."""
  wanted = sharding.make_mesh(mesh, list(step.mesh.devices.flat))
  trees = (step.state.params, step.state.opt_state, step.frozen or {})
  return sum(choices.bytes_per_device(x, sharding.shardings(x, wanted)) for x in trees)
