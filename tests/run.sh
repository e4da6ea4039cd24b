#!/usr/bin/env bash
# One venv for each stack that a CPU machine can have: install the doctor, let it install the stack, run all tests.
# The stacks' tests run side by side, each mostly on one core; what the second says is shown when the first is done.
set -eu
set -m # else a job in the background ignores Ctrl-C, and so would all that its tests start
cd "$(dirname "$0")/.."
. tests/stack_venv.sh
place_venvs
logs=$(mktemp -d)
# Whatever ends this ends what it started.
trap 'for job in $(cat "$logs"/*.pid 2>/dev/null); do kill -- "-$job" 2>/dev/null || true; done; rm -rf "$logs"' EXIT
for stack in $1; do
    (stack_venv "$stack") &
    echo $! >"$logs/$stack.pid"
done
made=""
for stack in $1; do
    rc=0
    wait "$(cat "$logs/$stack.pid")" || rc=$?
    rm "$logs/$stack.pid"
    [ "$rc" = 1 ] && continue # not for this Python
    [ "$rc" = 0 ] || exit 1
    made="$made $stack"
done
if [ -z "$made" ]; then
    echo "No stack of '$1' takes this Python; nothing was tested." >&2
    exit 1
fi
echo "== lint"
first=${made# }
bin=.venvs/${first%% *}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
test_stack() {
    local python=.venvs/$1/bin/python rc=0
    "$python" -m pytest -m "not long" --share "$2" --durations=8 -p no:cacheprovider || rc=1
    echo "-- with torchao and bitsandbytes"
    PYTHONPATH=.venvs/$1/aside "$python" -m pytest -m "not long" -p no:cacheprovider -k "torchao or nf4 or 8bit or 8_bits" \
        tests/trainer/test_train_steps.py tests/trainer/test_train_quantize.py || rc=1
    return $rc
}

export OMP_NUM_THREADS=1
number=0
count=$(echo $made | wc -w)
for stack in $made; do
    number=$((number + 1))
    : >"$logs/$stack.log" # `tail` may come to it before the job does
    test_stack "$stack" "$number/$count" >"$logs/$stack.log" 2>&1 &
    echo $! >"$logs/$stack.pid"
done
failed=0
for stack in $made; do
    echo "== tests on stack $stack"
    # `wait` would say nothing for minutes: CI would take the job for dead.
    tail --pid="$(cat "$logs/$stack.pid")" -n +1 -f "$logs/$stack.log"
    wait "$(cat "$logs/$stack.pid")" || failed=1
done
exit "$failed"
