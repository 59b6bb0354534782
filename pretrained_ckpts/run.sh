#!/usr/bin/env bash
# Fetches ImageNet weights of backbones into this folder and checks that each loads into its backbone, layer by layer:
#   cd pretrained_ckpts && bash run.sh [swin_large vit_large ...]
# What is there is kept. Without names: Swin-L, which the BIM and MTMamba experiments start from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=python
if [[ -x ../.venv/bin/python ]]; then python=../.venv/bin/python; fi
[[ $# -gt 0 ]] || set -- swin_large
for name in "$@"; do
    "$python" ../scripts/download_pretrained.py "$name" --out . --check
done
