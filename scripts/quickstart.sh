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
# A model that can do the task, one token a pass.
python -m refine_jax.main --config=configs/tiny.py:ar_sft --workdir="$run/base"
python scripts/export_hf.py --workdir="$run/base" --output="$run/model" --dtype=float32
# The same model, frozen, with an adapter that drafts.
python -m refine_jax.main --config=configs/tiny.py:gated --workdir="$run/adapter" \
  --config.model.pretrained="$run/model"
python scripts/export_hf.py --workdir="$run/adapter" --output="$run/huggingface"
python scripts/sample.py --model="$run/huggingface" --prompt="reverse hadj"
# One at a time: one token a pass, the drafts that pay on this device, and the most tokens a pass.
python -m refine_jax.evaluate --model="$run/huggingface" --data=data/tiny/test.parquet \
  --modes=ar,exact,exact:branches --block_sizes=16 --batch_size=1 --output="$run/evaluation"
