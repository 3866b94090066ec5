# Sourced by tools/demo, tools/test and .ci/run. Sets `venv`; makes that virtual environment once, with the tested
# versions of tools/constraints.txt.
#
#   LRQ_VENV    where it lives (default .venv)
#   PYTHON      the interpreter it is made from (default: the first of python3.11 ... python3 that is 3.11 or newer)

venv=${LRQ_VENV:-.venv}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # lrq_export/cli.py says why

# use_environment EXTRA: EXTRA is "" for the tool alone or "[dev]" with what the tests need.
use_environment() {
    local extra=$1 wanted python
    wanted="$PWD $(cat tools/constraints.txt pyproject.toml | cksum)"
    is_installed "$wanted" "$extra" || is_installed "$wanted" "[dev]" && return 0
    if [ ! -x "$venv/bin/pip" ]; then
        python=$(find_python) || return
        echo "making $venv with $python"
        "$python" -m venv "$venv"
    fi
    echo "installing the versions of tools/constraints.txt into $venv (once, some minutes)"
    # torch first: everything else that asks for it then finds the pinned one.
    pip_install torch
    pip_install -e ".$extra"
    printf '%s' "$wanted" > "$venv/.lrq-installed$extra"
}

is_installed() {
    [ "$(cat "$venv/.lrq-installed$2" 2>/dev/null)" = "$1" ]
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input -c tools/constraints.txt "$@"
}

find_python() {
    local each
    for each in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$each"
            return 0
        fi
    done
    echo "no Python of version 3.11 or newer was found. Fix: install one, or name it with PYTHON=..." >&2
    return 4
}
