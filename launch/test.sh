#!/usr/bin/env bash
# Runs the tests, on the CPU: installs the project and pytest into .venv first, if that has not been done.
#
# Usage: bash launch/test.sh [PYTEST ARGUMENT ...]
#   Exits with pytest's status.
#
#   bash launch/test.sh
#   bash launch/test.sh -x tests/test_config.py

set -euo pipefail
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install test
# Two at a time: much of the time is compiling, which takes one core.
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
