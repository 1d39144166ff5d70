#!/usr/bin/env bash
# Trains on a slice of TPU VMs: asks for it, sets it up, runs the same command on every host, and asks for another
# slice when this one is preempted.
#
#   ZONE=us-west4-a TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite launch/tpu_vm.sh NAME \
#     pretrain gemma_7b --run_dir gs://BUCKET/runs/7b --data.sources 'gs://BUCKET/corpus/*.jsonl.gz'
#
# Environment: ZONE, TYPE and RUNTIME as Cloud TPU names them; PROJECT; SPOT=1 for preemptible capacity.
# The run directory must be in a bucket: the disks of a slice go with it. Run this where it can stay, as in tmux.
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
: "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}"
name=$1
shift
place=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
cd "$(dirname "$0")/.."

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'value(state.state)' 2>/dev/null ||
    echo ABSENT
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker all --command "$1"
}

remove() {
  [ "$(state)" = ABSENT ] || gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

command=$(printf '%q ' "$@")
archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format tar.gz --output "$archive" HEAD

# The Python of these machines may be older than 3.11; uv brings its own.
set_up="mkdir -p gemma_jax && tar -xzf gemma_jax.tar.gz -C gemma_jax && cd gemma_jax &&
  python3 -m pip install --quiet --user uv && { [ -x .venv/bin/python ] || python3 -m uv venv --python 3.12 .venv; } &&
  python3 -m uv pip install --quiet --python .venv --editable '.[tpu,data]' --constraint constraints/py312.txt"

while true; do
  case $(state) in
    ABSENT)
      gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id "$name" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
      ;;
    FAILED | SUSPENDING | SUSPENDED)
      remove
      ;;
    ACTIVE)
      status=0
      gcloud compute tpus tpu-vm scp "$archive" "$name:gemma_jax.tar.gz" "${place[@]}" --worker all &&
        on_all_hosts "$set_up" &&
        on_all_hosts "cd gemma_jax && launch/restart.sh .venv/bin/python -u train.py $command" || status=$?
      # ssh itself fails with 255, and a slice that is preempted takes its hosts away: both are no end of the run.
      case $status in
        0) exit 0 ;;
        1 | 2) echo "the run has ended with status $status; $name is left as it is" >&2; exit "$status" ;;
      esac
      ;;
  esac
  sleep 30
done
