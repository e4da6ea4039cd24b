# Sourced: stack_venv STACK makes .venvs/STACK with the doctor, its tests' tools and that stack, which is installed from
# the file that `matrix export` writes; `fix --install` must then find nothing to do.
# Returns 1 and says why where this Python has no such stack, 2 where something failed.
pip="-m pip install --quiet --disable-pip-version-check"

free_gib() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 {print int($4 / 1048576)}'; }

# Both stacks fill 8 GiB, and the wheels 2.5 more while pip fetches them. Where the disk has no room for that and memory
# has, the venvs go into memory.
place_venvs() {
    local need=11 here there
    [ ! -e .venvs ] || return 0
    rm -f .venvs # a link into a memory that a restart has emptied
    here=$(free_gib .) there=$(free_gib /dev/shm)
    if grep -q '^[^ ]* /dev/shm [^ ]* [^ ]*noexec' /proc/mounts; then there=0; fi # in containers, often
    [ "${here:-$need}" -lt $need ] || return 0
    if [ "${there:-0}" -lt $need ]; then
        echo "This disk has $here GiB free and the venvs take $need: pip may end in 'No space left on device'. Free some room." >&2
        return 0
    fi
    echo "This disk has $here GiB free and the venvs take $need: they go to /dev/shm, which has $there."
    ln -sfn "$(mktemp -d /dev/shm/xflux-doctor-venvs.XXXXXX)" .venvs
}

stack_venv() {
    local venv=.venvs/$1 why fits=0
    if [ -e "$venv/ok" ] && [ ! pyproject.toml -nt "$venv/ok" ] && [ ! compat_matrix.yaml -nt "$venv/ok" ] &&
        [ ! "tests/extras/$1.txt" -nt "$venv/ok" ] && [ ! "tests/extras/$1-aside.txt" -nt "$venv/ok" ]; then
        return 0
    fi
    if [ -L .venvs ]; then # pip unpacks beside them
        local TMPDIR
        TMPDIR=$(realpath .venvs)
        export TMPDIR
    fi
    "${PYTHON:-python3}" -m venv "$venv" || return 2
    # Two at once would build in the same folder.
    flock .venvs/editable.lock "$venv/bin/python" $pip --editable '.[dev]' || return 2
    why=$("$venv/bin/python" tests/stack_fits.py "$1") || fits=$?
    if [ "$fits" = 3 ]; then
        echo "Stack $1 is not tested: it $why."
        return 1
    fi
    [ "$fits" = 0 ] || return 2
    "$venv/bin/xflux-doctor" matrix export "$1" >"$venv/$1.txt" || return 2
    # Where torch's page cannot be reached, pip asks it again for every package: one more try each, not five.
    "$venv/bin/python" $pip --retries 1 -r "$venv/$1.txt" || return 2
    "$venv/bin/xflux-doctor" fix --install --yes --cpu --stack "$1" || return 2
    "$venv/bin/python" $pip --no-deps -r "tests/extras/$1.txt" || return 2
    "$venv/bin/python" $pip --no-deps --upgrade --target "$venv/aside" -r "tests/extras/$1-aside.txt" || return 2
    touch "$venv/ok"
}
