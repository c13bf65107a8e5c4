#!/usr/bin/env bash
# Trains on bare hosts: run it on each of them, with the same ADDRESS and its own HOST.
#   ADDRESS=first-host:29400 HOSTS=2 HOST=0 bash scripts/launch/hosts.sh --config=.. --workdir=..
#   ADDRESS=first-host:29400 HOSTS=2 HOST=1 bash scripts/launch/hosts.sh --config=.. --workdir=..
# PROCESSES (default 1) is how many processes each host starts. One takes all of its GPUs; several
# take one each, the first to the first. The workdir must be the same directory on every host.
# What process N of a host prints goes to this terminal; a signal goes to all of them.
set -euo pipefail
: "${ADDRESS:?is HOST:PORT of the first host, a free port there}"
: "${HOSTS:?is how many hosts there are}"
: "${HOST:?is which of them this one is, from 0}"
processes=${PROCESSES:-1}
started=()
for ((i = 0; i < processes; i++)); do
  if ((processes > 1)); then export JAX_LOCAL_DEVICE_IDS=$i; fi
  "${PYTHON:-python}" -m refine_jax.main --coordinator_address="$ADDRESS" \
    --num_processes=$((HOSTS * processes)) --process_id=$((HOST * processes + i)) "$@" &
  started+=($!)
done
trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${started[@]}"; do
  # A trapped signal ends `wait` early, and not the process that it waits for.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && break; done
  wait "$pid" || { code=$?; ((status)) || status=$code; }
done
exit "$status"
