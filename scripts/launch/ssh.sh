#!/bin/bash
# One run on several machines that share a folder and know each other by ssh, without a scheduler:
#
#     GPUS=8 scripts/launch/ssh.sh node1,node2 --config_exp configs/bim_nyud.yml
#
# The repository, the data and the run's folder must lie at the same place on all of them. Ctrl-C asks the run to save and
# leave; start it again with the same line.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: GPUS=8 $0 HOST,HOST,... --config_exp FILE [key=value ...]" >&2
    exit 2
fi
IFS=, read -r -a hosts <<< "$1"
shift
folder=$(cd "$(dirname "$0")/../.." && pwd)
port=${PORT:-29400}
launch=(torchrun "--nnodes=${#hosts[@]}" "--nproc_per_node=${GPUS:-1}" "--master_addr=${hosts[0]}" "--master_port=$port")
run=(main.py --run_mode train "$@" resume=auto)

pids=()
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT TERM
for rank in "${!hosts[@]}"; do
    words=$(printf '%q ' "${launch[@]}" "--node_rank=$rank" "${run[@]}")
    # -tt: when this script or the connection ends, the processes over there are told
    ssh -tt -o BatchMode=yes "${hosts[$rank]}" \
        "cd $(printf '%q' "$folder") && if [ -d .venv ]; then . .venv/bin/activate; fi && exec $words" < /dev/null &
    pids+=($!)
done

code=0
for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
done
exit "$code"
