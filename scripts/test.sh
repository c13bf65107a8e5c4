#!/usr/bin/env bash
# Lints, checks types and tests; on a machine with python3 and pip it sets everything up itself.
#   bash scripts/test.sh [pytest arguments]
#   PYTHON=python3.12 bash scripts/test.sh     in .venv-3.12
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
setup_env test
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
ruff check .
ruff format --check --quiet .
basedpyright --level error
# A process a core, each with its share of the files, whose fixtures are costly, until it is done and
# takes over from another; up to 5 GB of memory each.
cores=$(getconf _NPROCESSORS_ONLN)
python -m pytest -q -n "$((cores < 4 ? cores : 4))" --dist worksteal "$@"
