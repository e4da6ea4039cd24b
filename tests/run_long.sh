#!/usr/bin/env bash
# Everything that takes longer than CI may: soaks and fuzzing, the trainer's kill loops on both stacks, all skews in real
# venvs (some GB of downloads), and the doctor's own tests on every Python found here. Leaves dated result files.
# PYTHONS names the interpreters; by default python3.10 to python3.14 on the PATH. PARTS names some of the parts.
set -u
cd "$(dirname "$0")/.."
. tests/stack_venv.sh
place_venvs
# A shim that starts nothing is no Python.
pythons=${PYTHONS:-$(for n in 10 11 12 13 14; do "python3.$n" -c "" 2>/dev/null && command -v "python3.$n"; done)}
export PYTHONS=$pythons # a skew of another Python looks for it here
all="soaks trainer skews pythons"
parts=${PARTS:-$all}
name=test-long$([ "$parts" = "$all" ] || printf -- '-%s' $parts)
out=benchmarks/results/$name-$(date -u +%Y-%m-%d).txt
failed=0
stack_venv cpu || exit 1
stack_venv xflux-2024 || [ $? = 1 ] || exit 1 # not for every Python; its skews are skipped then

log=$(mktemp)
trap 'rm -f "$log"' EXIT

long_tests() { # PYTHON ARGUMENTS: the end of what pytest said, and of a run that failed what is needed to see why
    local lines=15 rc=0
    "$1" -m pytest -m long "${@:2}" >"$log" 2>&1 || { rc=1 lines=400; }
    tail -n "$lines" "$log"
    return $rc
}

wanted() { case " $parts " in *" $1 "*) return 0 ;; esac; return 1; }

{
    echo "make test-long, $(date -u +%Y-%m-%dT%H:%MZ), $(git rev-parse --short HEAD), $(nproc) cores, $(uname -sm)"
    # Beside the soaks: each of the two keeps one core.
    others=$(mktemp)
    (wanted pythons && for python in $pythons; do
        version=$("$python" -c 'import platform; print(platform.python_version())')
        venv=.venvs/doctor-$version
        [ -e "$venv/bin/pytest" ] || { "$python" -m venv "$venv" && "$venv/bin/python" $pip --editable '.[dev]'; }
        echo "== the doctor's tests on Python $version (no torch)"
        "$venv/bin/python" -m pytest -m "not long" --ignore tests/trainer 2>&1 | tail -3
        [ "${PIPESTATUS[0]}" = 0 ] || echo "FAILED on Python $version"
    done) > "$others" 2>&1 &
    if wanted soaks; then
        echo "== soaks and fuzzing"
        long_tests .venvs/cpu/bin/python -s tests --ignore tests/test_skews.py --ignore tests/trainer || failed=1
    fi
    for stack in cpu xflux-2024; do
        wanted trainer && [ -e ".venvs/$stack/ok" ] || continue
        echo "== the trainer: kill loops and strategies on stack $stack"
        long_tests ".venvs/$stack/bin/python" --durations=6 tests/trainer tests/pairs || failed=1
    done
    if wanted skews; then
        echo "== real skews: foretold before import, and the true error"
        .venvs/cpu/bin/python -m pytest -m long -s tests/test_skews.py 2>&1 || failed=1
    fi
    wait
    cat "$others"
    grep -q "^FAILED" "$others" && failed=1
    rm -f "$others"
    [ "$failed" = 0 ] && echo "all passed" || echo "FAILED"
} | sed -e "s/^\([.sxF]*\)WARNING: .*/\1/" -e "s|$PWD/||g" -e "s|/tmp/pytest-of-[^/]*|/tmp/pytest|g" -e "s|$HOME/|~/|g" |
    tee "$out" # paths and indexes of one machine are nobody else's business
tail -1 "$out" | grep -q "all passed"
