#!/usr/bin/env bash
# Runs the randomization test on this machine: installs the project into .venv first, if that has not been done.
#
# Usage: bash launch/local.sh [FLAG ...]
#   FLAGs go to experiments/randomization_test.py (see its --help); a relative --workdir starts at the repository root.
#
#   bash launch/local.sh
#   bash launch/local.sh --workdir=runs/short --config.tuning.epochs=5
#   bash launch/local.sh --workdir=runs/smollm2 --config=experiments/configs/smollm2.py   # installs SmolLM2 too

set -euo pipefail
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

if [[ " $* " == *configs/smollm2.py\ * ]]; then
    install gguf
    install_smollm2
else
    install
fi
exec .venv/bin/python -m experiments.randomization_test --workdir=runs/randomization_test "$@"
