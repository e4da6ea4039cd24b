#!/usr/bin/env bash
# One venv for each stack that a CPU machine can have: install the doctor, let it install the stack, run all tests.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
pip="-m pip install --quiet --disable-pip-version-check"
ran=0
for stack in $1; do
    venv=.venvs/$stack
    if [ ! -e "$venv/ok" ] || [ pyproject.toml -nt "$venv/ok" ] || [ compat_matrix.yaml -nt "$venv/ok" ]; then
        "$python" -m venv "$venv"
        "$venv/bin/python" $pip --editable '.[dev]'
        if ! why=$("$venv/bin/python" tests/stack_fits.py "$stack"); then
            echo "Stack $stack is not tested: it $why."
            continue
        fi
        "$venv/bin/xflux-doctor" fix --install --yes --cpu --stack "$stack"
        touch "$venv/ok"
    fi
    if [ "$ran" = 0 ]; then
        echo "== lint"
        "$venv/bin/ruff" check .
        "$venv/bin/ruff" format --check .
        "$venv/bin/mypy"
    fi
    echo "== tests on stack $stack"
    "$venv/bin/python" -m pytest -m "not long" --durations=8
    ran=$((ran + 1))
done
if [ "$ran" = 0 ]; then
    echo "No stack of '$1' takes this Python; nothing was tested." >&2
    exit 1
fi
