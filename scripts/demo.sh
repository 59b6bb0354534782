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

# of_layout LAYOUT IMAGES LIST key=value ...: trains, evaluates, predicts. The first images of LIST lie in IMAGES.
of_layout() {
    local layout="$1" images="$2" list="$3" run="runs/example_lite0_$1"
    shift 3
    $python main.py --run_mode train --config_exp "configs/example/lite0_$layout.yml" --resume "db_root=$data" \
        progress=false "$@"
    $python main.py --run_mode infer --trained_model "$run/last.pt" "db_root=$data" progress=false
    $python main.py --run_mode predict --trained_model "$run/last.pt" --input "$photos"
    mkdir -p "$run/examples"
    for id in $(head -n 3 "$data/$list"); do cp "$data/$images/$id".* "$run/examples/"; done
    $python main.py --run_mode predict --trained_model "$run/last.pt" --input "$run/examples" --output "$run/predict"
}

# Two trainings side by side on half the cores each: small layers gain little from more threads.
export OMP_NUM_THREADS="$(( cpus > 1 ? cpus / 2 : 1 ))"
echo "== training a small BIM on each layout, evaluating and predicting"
set -m                                                # each in a process group of its own, to be ended together
trap 'for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done' EXIT
of_layout nyud NYUDv2/images NYUDv2/gt_sets/val.txt "$@" 2>&1 | sed -u "s/^/nyud   | /" &
nyud=$!
of_layout pascal PASCALContext/JPEGImages PASCALContext/ImageSets/Context/val.txt "$@" 2>&1 | sed -u "s/^/pascal | /" &
pascal=$!
wait "$nyud"
wait "$pascal"

for layout in nyud pascal; do
    run="runs/example_lite0_$layout"
    echo
    echo "== $layout layout, test split (40 rendered images)"
    $python scripts/compare.py "untrained=$run/results/step_0.json" "trained=$run/infer/results.json"
    echo "pictures: $run/predict/panels"
done
