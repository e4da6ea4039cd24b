#!/usr/bin/env bash
# Install the stacks of compat_matrix.yaml from their exported files, import everything, train small models on CPU ranks.
#
#   benchmarks/stacks.sh [NAME ...]    these stacks (all): an empty venv each, `xflux-doctor matrix export NAME` and
#                                      `pip install -r` of that file, a table, benchmarks/results/stack-NAME-pyX.Y.json
#   benchmarks/stacks.sh breaks        lay each known bad version over a copy of a stack's venv, see the doctor predict
#                                      it and the true error come (tests/skews.py), benchmarks/results/skews-DATE.json
#
#   PYTHON        interpreter of the venvs (python3)
#   XFLUX_DOCTOR  the doctor's command (.venv/bin/xflux-doctor)
#   WORK          where the venvs go (a new temporary folder, removed at the end)
# A stack takes 1 to 8 GB and some minutes. No GPU is used. Exit 1 when any step fails.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ "${1:-}" = breaks ]; then
    . tests/stack_venv.sh
    place_venvs
    for name in cpu xflux-2024; do stack_venv "$name"; done
    exec .venvs/cpu/bin/python -m pytest -m long -s tests/test_skews.py
fi
doctor=${XFLUX_DOCTOR:-.venv/bin/xflux-doctor}
results=$PWD/benchmarks/results
work=${WORK:-}
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$results" "$work"
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

install() { # a stack into an empty $work/NAME, from its own exported file
    local venv=$work/$1 begin=$SECONDS
    "$doctor" matrix export "$1" >"$work/$1.txt" || return 1
    "$python" -m venv --clear "$venv" || return 1
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'pip>=22.2' || return 1 # for --report
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --report "$work/$1.report.json" \
        -r "$work/$1.txt" || return 1
    echo "== $1: installed in $((SECONDS - begin)) s"
    "$venv/bin/python" -m pip check
}

failed=0
[ $# -gt 0 ] || set -- xflux-2024 cuda12 cuda13 cpu
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
for name in "$@"; do
    build=$("$doctor" matrix show "$name" | awk '/^  torch:/ {torch = 1} torch && /build:/ {print $2; exit}')
    if install "$name"; then
        TORCH_EXTENSIONS_DIR=$work/$name.ops "$work/$name/bin/python" benchmarks/stack_report.py "$name" "$build" \
            "$work/$name.txt" "$results/stack-$name-py$minor.json" "$work/$name.report.json" 2>"$work/$name.log" ||
            { failed=1; tail -n 20 "$work/$name.log"; }
    else
        echo "FAIL $name could not be installed with Python $minor" && failed=1
    fi
    [ -n "${WORK:-}" ] || rm -rf "${work:?}/$name" "$work/$name.ops"
done
exit "$failed"
