#!/usr/bin/env bash
# Trains under Slurm, one process for each GPU (jax finds the others from Slurm's environment):
#
#   sbatch launch/slurm.sh pretrain gemma_2b --run_dir /shared/runs/2b
#
# Ten minutes before the time limit, and when the job is preempted, all processes save and end with status 75; the job
# then goes back into the queue and goes on from there. It also does when a node is lost (134: jax has aborted the rest).
#SBATCH --job-name=gemma
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
srun --kill-on-bad-exit=1 .venv/bin/python -u train.py "$@"
status=$?

if [ "$status" -eq 75 ] || [ "$status" -eq 134 ]; then
  # A job that ends so soon again and again is broken, not preempted.
  if [ "$SECONDS" -lt 900 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge 5 ]; then
    echo "slurm.sh: giving up, status $status after $SECONDS s in start $SLURM_RESTART_COUNT" >&2
    exit "$status"
  fi
  echo "slurm.sh: status $status, back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
