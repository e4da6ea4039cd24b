#!/usr/bin/env bash
# Everything that takes longer than CI may: soaks and fuzzing, and the doctor's own tests on every Python found here.
# Leaves a dated result file. PYTHONS names the interpreters; by default python3.10 to python3.14 on the PATH.
set -u
cd "$(dirname "$0")/.."
. tests/stack_venv.sh
pythons=${PYTHONS:-$(for n in 10 11 12 13 14; do command -v "python3.$n"; done)}
out=benchmarks/results/test-long-$(date -u +%Y-%m-%d).txt
failed=0
stack_venv cpu || exit 1
{
    echo "make test-long, $(date -u +%Y-%m-%dT%H:%MZ), $(git rev-parse --short HEAD), $(nproc) cores, $(uname -sm)"
    for python in $pythons; do
        version=$("$python" -c 'import platform; print(platform.python_version())')
        venv=.venvs/doctor-$version
        [ -e "$venv/bin/pytest" ] || { "$python" -m venv "$venv" && "$venv/bin/python" $pip --editable '.[dev]'; }
        echo "== the doctor's tests on Python $version (no torch)"
        "$venv/bin/python" -m pytest -m "not long" --ignore tests/trainer 2>&1 | tail -3
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    done
    echo "== soaks and fuzzing"
    .venvs/cpu/bin/python -m pytest -m long -s tests 2>&1 | tail -15
    [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    [ "$failed" = 0 ] && echo "all passed" || echo "FAILED"
} | tee "$out"
tail -1 "$out" | grep -q "all passed"
