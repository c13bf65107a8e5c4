#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice, each with the repository at the same path.
#   TPU=my-slice ZONE=us-east5-b bash scripts/launch/tpu_pod.sh --config=.. --workdir=/mnt/shared/run
# REPOSITORY (default refine_jax) is its path there; the workdir must be mounted on every host.
set -euo pipefail
: "${TPU:?is the name of the TPU VM}"
: "${ZONE:?is its zone}"
printf -v arguments ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="cd $(
  printf %q "${REPOSITORY:-refine_jax}"
) && exec ${PYTHON:-python3} -m refine_jax.main --distributed$arguments"
