#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on every worker of a TPU VM; not to be called by hand.
#
# Usage: bash launch/tpu_worker.sh prepare [BUCKET]      Python, the project, and the bucket at ~/bucket and ./bucket
#        bash launch/tpu_worker.sh run MODULE [FLAG ...]  leaves the exit status in ./status

set -euo pipefail
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

prepare() {
    local bucket=${1:-} list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
    if ! find_python &>/dev/null; then # the images come with Python 3.10
        sudo apt-get update -q && sudo apt-get install -yq python3.11-venv
    fi
    install tpu
    install gcs
    [[ $bucket ]] || return 0
    if ! command -v gcsfuse >/dev/null; then
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee "$list"
        sudo apt-get update -q && sudo apt-get install -yq gcsfuse
    fi
    mkdir -p ~/bucket
    mountpoint -q ~/bucket || gcsfuse --implicit-dirs "$bucket" ~/bucket
    ln -sfn ~/bucket bucket
}

run() {
    local status=0
    .venv/bin/python -m "$@" --multihost || status=$?
    echo "$status" >status
}

"$@"
