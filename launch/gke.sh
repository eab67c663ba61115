#!/usr/bin/env bash
# Runs an experiment on TPU slices of a GKE cluster, with xpk (github.com/AI-Hypercomputer/xpk), which builds an image of
# this checkout, starts it on every host of the slice, and starts it again when the slice was preempted.
#
# Usage: bash launch/gke.sh --cluster=NAME --project=PROJECT --bucket=BUCKET [OPTION ...] -- MODULE [FLAG ...]
#   --cluster=NAME    a cluster that `xpk cluster create` has made
#   --project=PROJECT --zone=ZONE   where it is (us-west4-a)
#   --type=TYPE       of the slice (v5litepod-256)
#   --bucket=BUCKET   Cloud Storage bucket, mounted at /bucket: the place for --workdir and --facts
#   --name=NAME       of the workload (lamini)
#   --restarts=N      after preemptions (20)
#   --delete          deletes the workload instead
#   --dry_run         prints every command instead of running it
#
#   bash launch/gke.sh --cluster=pods --project=mine --bucket=my-bucket -- \
#       experiments.randomization_test --workdir=/bucket/study --config.execution.mesh.model=4

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cluster='' project='' zone=us-west4-a type=v5litepod-256 bucket='' name=lamini restarts=20 delete='' dry_run=''
while (($#)); do
    case $1 in
        --cluster=* | --project=* | --zone=* | --type=* | --bucket=* | --name=* | --restarts=*)
            option=${1%%=*}
            printf -v "${option#--}" %s "${1#*=}"
            ;;
        --delete | --dry_run) printf -v "${1#--}" yes ;;
        --) shift && break ;;
        *) echo "error: unknown option $1 (see the first lines of $0)" >&2 && exit 2 ;;
    esac
    shift
done
[[ $cluster && $project ]] || { echo "error: --cluster and --project are required" >&2 && exit 2; }
[[ $dry_run ]] || command -v xpk >/dev/null || { echo "error: xpk is not installed (pip install xpk)" >&2 && exit 2; }

run() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}
where=(--cluster="$cluster" --project="$project" --zone="$zone")

if [[ $delete ]]; then
    run xpk workload delete --workload="$name" "${where[@]}"
    exit
fi
[[ $bucket ]] || { echo "error: --bucket is required: the hosts share no other files" >&2 && exit 2; }
(($#)) || { echo "error: which experiment? give -- MODULE [FLAG ...]" >&2 && exit 2; }
run xpk storage attach "$name-bucket" "${where[@]}" --type=gcsfuse --bucket="$bucket" --mount-point=/bucket \
    --size=1 --readonly=false --auto-mount=true
run xpk workload create --workload="$name" "${where[@]}" --tpu-type="$type" --num-slices=1 \
    --max-restarts="$restarts" --base-docker-image=python:3.12 --script-dir=. \
    --command="pip install -q .[tpu,gcs] && python -m $(printf '%q ' "$@")--multihost"
