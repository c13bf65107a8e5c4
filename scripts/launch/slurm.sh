#!/usr/bin/env bash
# Trains on the nodes of a SLURM job, one process a GPU; JAX finds the others by itself.
#   sbatch --nodes=2 scripts/launch/slurm.sh --config=configs/x.py --workdir=DIR [--config.KEY=VALUE]
# DIR must be the same directory on every node. Before the time is over the run saves and ends, and
# the same command goes on from there; so it does after a node failed, with any number of nodes.
#SBATCH --job-name=refine_jax
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --signal=TERM@300
set -euo pipefail
exec srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m refine_jax.main --distributed "$@"
