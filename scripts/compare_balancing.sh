#!/usr/bin/env bash
# The table of docs/balancing.md: one small training per loss balancing and seed on rendered rooms, then mean and spread.
# What is trained already is kept, what was interrupted goes on.
#   bash scripts/compare_balancing.sh [SCHEME ...]     SEEDS="0 1 2" OUT=runs/balancing DATA=datasets/balancing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
seeds="${SEEDS:-0 1 2}" out="${OUT:-runs/balancing}" data="${DATA:-datasets/balancing}"
schemes="${*:-weighted_sum log uncertainty geometric_mean dwa famo gradnorm db_mtl pcgrad cagrad nash_mtl}"

[[ -d "$data" ]] || $python scripts/render_example.py --out "$data" --train 160 --val 40 --size 96 128 --seed 0 \
    --layouts NYUDv2
runs=()
for scheme in $schemes; do
    for seed in $seeds; do
        runs+=("$out/${scheme}_seed$seed")
        $python main.py --config_exp configs/example/balancing.yml db_root="$data" out_dir="$out" resume=auto \
            version_name="${scheme}_seed$seed" seed="$seed" loss_kwargs.loss_scheme="$scheme"
    done
done
$python scripts/compare.py "${runs[@]}"
