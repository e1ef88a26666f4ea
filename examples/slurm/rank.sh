#!/usr/bin/env bash
# One training process of a job step: bash rank.sh COMMAND... It tells torch.distributed its rank, and turns USR1, which
# srun hands on, into TERM, on which the trainer saves and ends. Slurm may signal every process of a task: the command
# ignores USR1.
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID

signals=0 command=
trap 'signals=$((signals + 1)); kill -TERM "$command" 2>/dev/null || true' USR1 TERM
(
  trap '' USR1
  trap - TERM
  exec "$@"
) &
command=$!
while :; do
  before=$signals
  status=0
  wait "$command" || status=$?
  # A trapped signal interrupts `wait`; then the command is still at work, or its status is yet to be read.
  ((signals == before)) && exit "$status"
done
