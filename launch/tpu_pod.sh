#!/usr/bin/env bash
# Runs an experiment on a Cloud TPU pod: makes the TPU VM or takes the one that is there, copies this checkout to all of
# its workers, installs it, runs on all of them, starts again after a preemption, and fetches the results.
#
# Usage: bash launch/tpu_pod.sh [OPTION ...] -- MODULE [FLAG ...]
#   --name=NAME       of the TPU VM (lamini)
#   --zone=ZONE       (us-west4-a)
#   --type=TYPE       accelerator type (v5litepod-256)
#   --version=NAME    software version (v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e)
#   --bucket=BUCKET   Cloud Storage bucket, mounted on every worker at ~/bucket: the place for --workdir and --facts
#   --fetch=DIR       copies ~/bucket/DIR to runs/DIR when all is done
#   --attempts=N      how often it starts after preemptions (20)
#   --spot            a TPU VM that may be preempted at any time, for less
#   --delete          deletes the TPU VM at the end, whatever came of it
#   --dry_run         prints every command instead of running it
#
#   bash launch/tpu_pod.sh --bucket=my-bucket --fetch=study --spot --delete -- \
#       experiments.randomization_test --workdir=bucket/study --config.execution.mesh.model=4

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=lamini zone=us-west4-a type=v5litepod-256 version=v2-alpha-tpuv5-lite
bucket='' fetch='' attempts=20 spot='' delete='' dry_run=''
while (($#)); do
    case $1 in
        --name=* | --zone=* | --type=* | --version=* | --bucket=* | --fetch=* | --attempts=*)
            option=${1%%=*}
            printf -v "${option#--}" %s "${1#*=}"
            ;;
        --spot | --delete | --dry_run) printf -v "${1#--}" yes ;;
        --) shift && break ;;
        *) echo "error: unknown option $1 (see the first lines of $0)" >&2 && exit 2 ;;
    esac
    shift
done
(($#)) || { echo "error: which experiment? give -- MODULE [FLAG ...]" >&2 && exit 2; }
[[ $attempts =~ ^[1-9][0-9]*$ ]] || { echo "error: --attempts=$attempts: not a number of attempts" >&2 && exit 2; }
[[ -z $fetch || -n $bucket ]] || { echo "error: --fetch needs --bucket" >&2 && exit 2; }
[[ $dry_run ]] || command -v gcloud >/dev/null || { echo "error: gcloud is not installed" >&2 && exit 2; }

run() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}
tpu() { run gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
on_all() { tpu ssh --worker=all --command="cd lamini_jax && bash launch/tpu_worker.sh $(printf '%q ' "$@")"; }

# shellcheck disable=SC2329 # the trap invokes it
remove() { tpu delete --quiet; }
[[ $delete ]] && trap remove EXIT

create() {
    local state=''
    [[ $dry_run ]] || state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null) || true
    [[ $state == READY ]] && return
    [[ -z $state ]] || tpu delete --quiet # preempted: what is left of it is in the way
    tpu create --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

prepare() {
    local archive=${TMPDIR:-/tmp}/lamini_jax.tar.gz
    run tar --exclude=./.venv --exclude=./.git --exclude=./runs -czf "$archive" .
    run gcloud compute tpus tpu-vm scp "$archive" "$name:lamini_jax.tar.gz" --zone="$zone" --worker=all
    tpu ssh --worker=all --command='mkdir -p lamini_jax && tar -xzf lamini_jax.tar.gz -C lamini_jax'
    on_all prepare "$bucket"
}

# What the first worker's process exited with; nothing if the TPU VM is gone.
outcome() {
    [[ $dry_run ]] && echo 0 && return
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command='cat lamini_jax/status' 2>/dev/null || true
}

for ((attempt = 1; attempt <= attempts; attempt++)); do
    create
    prepare
    on_all run "$@" || true
    status=$(outcome)
    # 75: preempted, all is saved. 6: another worker is gone.
    [[ -z $status || $status == 75 || $status == 6 ]] || break
    echo "attempt $attempt of $attempts was stopped (${status:-the TPU VM is gone}); starting again" >&2
done
[[ -z $fetch ]] || run gcloud storage cp --recursive "gs://$bucket/$fetch" runs/
exit "${status:-75}"
