"""One of several processes: joins the others and does training runs, writing down what it is fed.

python processes_worker.py ADDRESS COUNT INDEX JSON, where JSON is a list of runs, each a list of
command-line arguments. Into each run's workdir it writes rows-INDEX.json: for each batch that was
put on the devices a list of [first row, example ids of the rows] for each device of this process.
"""

import json
import sys
from pathlib import Path

from absl import flags

from refine_jax import distributed
from refine_jax.cli import entry_point
from refine_jax.config import command_line, from_config_dict


def run(argv: list[str]) -> int:
  from refine_jax import sharding
  from refine_jax.training import train

  values = flags.FlagValues()
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
  config, _ = command_line.parse(["worker", *argv], values)
  fed, put = [], sharding.put_batch

  def put_and_tell(batch, mesh, *, accumulated, **options):
    result = put(batch, mesh, accumulated=accumulated, **options)
    if accumulated:
      shards = result.example_ids.addressable_shards
      fed.append([[s.index[1].start or 0, s.data[..., 0].tolist()] for s in shards])
    return result

  sharding.put_batch = put_and_tell
  try:
    return train.run(from_config_dict(config), workdir.value)
  finally:
    sharding.put_batch = put
    place = Path(workdir.value)
    if fed and place.is_dir():
      (place / f"rows-{sys.argv[3]}.json").write_text(json.dumps(fed))


@entry_point
def main():
  address, count, index, runs = sys.argv[1:]
  with distributed.joined(distributed.Place(address, int(count), int(index))):
    return max(run(argv) for argv in json.loads(runs))


main()
