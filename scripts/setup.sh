#!/usr/bin/env bash
# Creates .venv beside this repository's README and installs the pinned requirements.
#   bash scripts/setup.sh [--dev]
# A second call does nothing: the requirement files' checksum is remembered in .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=(requirements.txt)
if [[ "${1:-}" == "--dev" ]]; then requirements+=(requirements-dev.txt); fi
stamp=".venv/installed-$(IFS=+; echo "${requirements[*]}")"
wanted="$(cat "${requirements[@]}" | cksum)"
if [[ -x .venv/bin/python && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then exit 0; fi

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3 python; do
        if [[ -n "$candidate" ]] && "$candidate" -c \
            'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10, 3.11 or 3.12 is needed and was not found; set PYTHON=/path/to/python" >&2
    exit 1
}

if [[ ! -x .venv/bin/python ]]; then
    python="$(find_python)"
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
echo "installing ${requirements[*]} (a few minutes the first time)"
args=()
for file in "${requirements[@]}"; do args+=(-r "$file"); done
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${args[@]}"
echo "$wanted" > "$stamp"
