#!/bin/bash
# One run on a SLURM cluster, requeued whenever it is preempted or its time is up, until it is done:
#
#     sbatch --nodes=2 --gpus-per-node=8 scripts/launch/slurm.sh --config_exp configs/bim_nyud.yml
#     sbatch --array=0-2 scripts/launch/slurm.sh --config_exp configs/bim_nyud.yml     # three seeds, one run each
#
# Everything behind the script's name goes to main.py. Options in the lines below can be given to sbatch instead.
#SBATCH --job-name=mtdp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -d .venv ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

arguments=("$@")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then      # an array is the same experiment with other seeds
    name=${VERSION_NAME:-$(basename "$(printf '%s\n' "$@" | grep -m1 '\.yml$')" .yml)}
    arguments+=("seed=$SLURM_ARRAY_TASK_ID" "version_name=${name}_seed$SLURM_ARRAY_TASK_ID")
fi

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

# resume=auto continues what is there and starts where nothing is: the same line serves the first and every later start.
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d --rdzv_endpoint="$head_node:$((20000 + SLURM_JOB_ID % 20000))" --rdzv_id="$SLURM_JOB_ID" \
    main.py --run_mode train "${arguments[@]}" resume=auto &
step=$!

# Two minutes before the end SLURM signals this shell (at a preemption with send_user_signal too): the processes of the
# step are asked to save and leave.
asked=""
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do           # `wait` returns at the signal, the run needs a moment more
    code=0
    wait "$step" || code=$?
done
if [ "$code" -ne 0 ] && [ -n "$asked" ]; then    # torchrun's own code tells nothing of what its processes ended with
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
