#!/usr/bin/env bash
# One venv for each stack that a CPU machine can have: install the doctor, let it install the stack, run all tests.
set -eu
cd "$(dirname "$0")/.."
. tests/stack_venv.sh
ran=0
for stack in $1; do
    made=0
    stack_venv "$stack" || made=$?
    [ "$made" = 1 ] && continue # not for this Python
    [ "$made" = 0 ] || exit 1
    venv=.venvs/$stack
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
