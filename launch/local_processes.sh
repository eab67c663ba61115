#!/usr/bin/env bash
# Runs a command as several processes on this machine, each with some CPU devices, as a cluster would run it.
#
# Usage: bash launch/local_processes.sh [--processes=N] [--devices=N] [--dry_run] -- MODULE [FLAG ...]
#   --processes=N   (2)
#   --devices=N     of each process (4)
#   --dry_run       prints every command instead of running it
#   Exits with the first status that is not 0. Their output is runs/local_processes/N.log, the first one's also here.
#
#   bash launch/local_processes.sh -- lamini_jax.tune --facts=facts.jsonl --workdir=runs/two --config.execution.mesh.model=2

set -euo pipefail
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

processes=2 devices=4 dry_run=''
while (($#)); do
    case $1 in
        --processes=* | --devices=*)
            option=${1%%=*}
            printf -v "${option#--}" %s "${1#*=}"
            ;;
        --dry_run) dry_run=yes ;;
        --) shift && break ;;
        *) echo "error: unknown option $1 (see the first lines of $0)" >&2 && exit 2 ;;
    esac
    shift
done
(($#)) || { echo "error: which command? give -- MODULE [FLAG ...]" >&2 && exit 2; }
for number in "$processes" "$devices"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "error: $number: not a number of processes or devices" >&2 && exit 2; }
done

[[ $dry_run ]] || install
port=$((20000 + RANDOM % 20000))
mkdir -p runs/local_processes
pids=()
for ((id = 0; id < processes; id++)); do
    command=(env JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=$devices"
        .venv/bin/python -m "$@" --multihost --coordinator="localhost:$port" --num_processes="$processes" --process_id="$id")
    if [[ $dry_run ]]; then
        printf '%q ' "${command[@]}" && echo
    else
        log=runs/local_processes/$id.log
        if ((id)); then "${command[@]}" &>"$log" & else "${command[@]}" &> >(tee "$log") & fi
        pids+=($!)
    fi
done
# Whoever stops this script stops them all.
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || { code=$? && ((status)) || status=$code; }
done
wait
exit "$status"
