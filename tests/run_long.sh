#!/usr/bin/env bash
# Everything that takes longer than CI may: soaks and fuzzing, all skews in real venvs (some GB of downloads), and the
# doctor's own tests on every Python found here. Leaves dated result files. PYTHONS names the interpreters; by default python3.10 to python3.14 on the PATH.
set -u
cd "$(dirname "$0")/.."
. tests/stack_venv.sh
pythons=${PYTHONS:-$(for n in 10 11 12 13 14; do command -v "python3.$n"; done)}
export PYTHONS=$pythons # a skew of another Python looks for it here
out=benchmarks/results/test-long-$(date -u +%Y-%m-%d).txt
failed=0
stack_venv cpu || exit 1
stack_venv xflux-2024 || [ $? = 1 ] || exit 1 # not for every Python; its skews are skipped then
{
    echo "make test-long, $(date -u +%Y-%m-%dT%H:%MZ), $(git rev-parse --short HEAD), $(nproc) cores, $(uname -sm)"
    # Beside the soaks: each of the two keeps one core.
    others=$(mktemp)
    (for python in $pythons; do
        version=$("$python" -c 'import platform; print(platform.python_version())')
        venv=.venvs/doctor-$version
        [ -e "$venv/bin/pytest" ] || { "$python" -m venv "$venv" && "$venv/bin/python" $pip --editable '.[dev]'; }
        echo "== the doctor's tests on Python $version (no torch)"
        "$venv/bin/python" -m pytest -m "not long" --ignore tests/trainer 2>&1 | tail -3
        [ "${PIPESTATUS[0]}" = 0 ] || echo "FAILED on Python $version"
    done) > "$others" 2>&1 &
    echo "== soaks and fuzzing"
    .venvs/cpu/bin/python -m pytest -m long -s tests --ignore tests/test_skews.py 2>&1 | tail -15
    [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    echo "== real skews: foretold before import, and the true error"
    .venvs/cpu/bin/python -m pytest -m long -s tests/test_skews.py 2>&1 | grep -v "WARNING: Location"
    [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    wait
    cat "$others"
    grep -q "^FAILED" "$others" && failed=1
    rm -f "$others"
    [ "$failed" = 0 ] && echo "all passed" || echo "FAILED"
} | tee "$out"
tail -1 "$out" | grep -q "all passed"
