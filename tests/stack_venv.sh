# Sourced: stack_venv STACK makes .venvs/STACK with the doctor, its tests' tools and that stack, which is installed from
# the file that `matrix export` writes; `fix --install` must then find nothing to do.
# Returns 1 and says why where this Python has no such stack, 2 where something failed.
pip="-m pip install --quiet --disable-pip-version-check"

stack_venv() {
    local venv=.venvs/$1 why fits=0
    if [ -e "$venv/ok" ] && [ ! pyproject.toml -nt "$venv/ok" ] && [ ! compat_matrix.yaml -nt "$venv/ok" ] &&
        [ ! "tests/extras/$1.txt" -nt "$venv/ok" ] && [ ! "tests/extras/$1-aside.txt" -nt "$venv/ok" ]; then
        return 0
    fi
    "${PYTHON:-python3}" -m venv "$venv" || return 2
    "$venv/bin/python" $pip --editable '.[dev]' || return 2
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
