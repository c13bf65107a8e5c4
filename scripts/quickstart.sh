#!/usr/bin/env bash
# The main job at its smallest, on a CPU: data, training, export, sampling, scoring. It sets up
# everything itself. Each run gets a new directory under runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
setup_env ""
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
python scripts/make_tiny_data.py data/tiny
python -m refine_jax.main --config=configs/tiny.py --workdir="$run"
python scripts/export_hf.py --workdir="$run" --output="$run/huggingface" --dtype=float32
python scripts/sample.py --model="$run/huggingface" --prompt="reverse hadj" --block_size=8
python -m refine_jax.evaluate --model="$run/huggingface" --data=data/tiny/test.parquet \
  --modes=exact --block_sizes=8 --output="$run/evaluation"
