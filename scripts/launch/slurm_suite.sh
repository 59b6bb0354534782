#!/bin/bash
# A suite of trainings (docs/fair_table.md) as an array of jobs, each with one GPU and its share of the rows:
#
#     sbatch --array=0-10 scripts/launch/slurm_suite.sh configs/suites/nyud_swin_large.yml
#
# A job that is preempted or out of time is requeued and goes on where its runs stood. When all are done:
#
#     python scripts/fair_table.py configs/suites/nyud_swin_large.yml --page
#SBATCH --job-name=suite
#SBATCH --nodes=1
#SBATCH --ntasks=1
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

python scripts/fair_table.py "$@" --share "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --devices cuda:0 &
suite=$!

# Two minutes before the end the training is asked to save and leave, which ends the suite with 75: then this job runs again.
trap 'pkill -TERM -P "$suite" -f main.py || true' USR1 TERM
code=0
wait "$suite" || code=$?
while kill -0 "$suite" 2>/dev/null; do
    code=0
    wait "$suite" || code=$?
done
if [ "$code" -eq 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit 0
fi
exit "$code"
