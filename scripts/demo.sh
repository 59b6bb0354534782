#!/usr/bin/env bash
# From a fresh clone to a trained BIM, its scores and pictures: renders the example data in both layouts, trains a
# small BIM on each, evaluates all six tasks, predicts on photographs. Run again, it reuses what is there.
#   bash scripts/demo.sh [key=value ...]        e.g. max_iter=1000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python
data=datasets/example
cpus="$(getconf _NPROCESSORS_ONLN)"

echo "== rendering the example data set into $data"
$python scripts/render_example.py --out "$data" --train 160 --val 40 --size 128 160 --seed 0 --workers "$cpus" \
    --layouts NYUDv2 PASCALContext

photos=datasets/photos
if [[ ! -d "$photos" ]]; then
    mkdir -p "$photos.partial"
    $python - "$photos.partial" <<'PYTHON'
import shutil
import sys
from pathlib import Path

import skimage

for name in ("astronaut.png", "chelsea.png", "coffee.png"):        # photographs that scikit-image ships
    shutil.copy(Path(skimage.__file__).parent / "data" / name, sys.argv[1])
PYTHON
    mv "$photos.partial" "$photos"
fi

for layout in nyud pascal; do
    run="runs/example_lite0_$layout"
    echo "== training a small BIM on the $layout layout"
    $python main.py --run_mode train --config_exp "configs/example/lite0_$layout.yml" --resume "db_root=$data" "$@"
    echo "== evaluating and predicting"
    $python main.py --run_mode infer --trained_model "$run/last.pt" "db_root=$data"
    $python main.py --run_mode predict --trained_model "$run/last.pt" --input "$photos"
    folder="$([[ $layout == nyud ]] && echo NYUDv2/images || echo PASCALContext/JPEGImages)"
    val="$([[ $layout == nyud ]] && echo NYUDv2/gt_sets/val.txt || echo PASCALContext/ImageSets/Context/val.txt)"
    mkdir -p "$run/examples"
    for id in $(head -n 3 "$data/$val"); do cp "$data/$folder/$id".* "$run/examples/"; done
    $python main.py --run_mode predict --trained_model "$run/last.pt" --input "$run/examples" --output "$run/predict"
done

for layout in nyud pascal; do
    run="runs/example_lite0_$layout"
    echo
    echo "== $layout layout, test split (40 rendered images)"
    $python scripts/compare.py "untrained=$run/results/step_0.json" "trained=$run/infer/results.json"
    echo "pictures: $run/predict/panels"
done
