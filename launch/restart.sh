#!/usr/bin/env bash
# Runs a command again and again while it ends in a way that a restart mends:
#   75   it was asked to stop and has saved, or another process of its job is gone
#   134  jax has aborted it, because another process of its job is gone (128 + SIGABRT)
# Everything else ends this script with the same status: 0 is done, 2 a mistake of the user, 1 a bug.
#
#   launch/restart.sh python train.py pretrain gemma_2b --run_dir gs://BUCKET/runs/2b
#
# It gives up after RESTART_LIMIT (5) starts in a row that lasted less than RESTART_QUICK_SECONDS (900) each.
# SIGTERM is passed on, and then nothing is restarted: the machine is going.
set -uo pipefail

quick=0
stopping=
child=
trap 'stopping=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT

while true; do
  started=$SECONDS
  "$@" &
  child=$!
  # A signal that came just before had no child to be passed on to.
  [ -n "$stopping" ] && kill -TERM "$child"
  wait "$child"
  status=$?
  # A signal ends `wait` before the child ends.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  if [ "$status" -ne 75 ] && [ "$status" -ne 134 ] || [ -n "$stopping" ]; then
    exit "$status"
  fi
  if [ $((SECONDS - started)) -lt "${RESTART_QUICK_SECONDS:-900}" ]; then
    quick=$((quick + 1))
  else
    quick=0
  fi
  if [ "$quick" -ge "${RESTART_LIMIT:-5}" ]; then
    echo "restart.sh: giving up after $quick quick ends in a row, the last with status $status" >&2
    exit "$status"
  fi
  echo "restart.sh: status $status, starting again" >&2
done
