#!/bin/sh
# Installs minitron and everything it needs into .venv, from requirements.lock. `make setup` runs it.
# Needs only a Python 3.12 or 3.13 on the machine; set PYTHON=/path/to/python to choose one.
# Run again it returns at once, unless the lock, pyproject.toml or the place of the checkout changed.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd -- "$root"
venv=.venv
inputs=$(cat requirements.lock pyproject.toml launch/setup.sh | cksum | tr ' ' '-')
stamp=$venv/.minitron-$inputs
busy=$venv/.minitron-installing

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# A copied or moved .venv still points at its first place, so the path counts too.
venv_is_here() { [ -x "$venv/bin/python" ] && grep -qF -- "$root/.venv" "$venv/bin/activate"; }

if [ -e "$stamp" ] && venv_is_here; then exit 0; fi

# Prints why the interpreter "$1" cannot be used, or nothing where it can. Runs it: a command of the
# right name may be a version manager's shim that leads nowhere.
why_not() {
    "$1" - 2>/dev/null <<'PY' || echo "does not run"
import sys
if not (3, 12) <= sys.version_info[:2] < (3, 14):
    print("is Python %d.%d" % sys.version_info[:2])
    sys.exit(0)
try:
    import ensurepip, venv
except ImportError as error:
    print("has no module %s (Debian, Ubuntu: apt install python3.%d-venv)"
          % (error.name, sys.version_info[1]))
PY
}

rejected=
python=
try() {
    [ -z "$python" ] || return 0
    case $1 in
        */*) [ -x "$1" ] || return 0 ;;
        *) command -v "$1" >/dev/null 2>&1 || return 0 ;;
    esac
    reason=$(why_not "$1")
    if [ -z "$reason" ]; then
        python=$1
    else
        rejected="$rejected
  $1 $reason"
    fi
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        try "$PYTHON"
        [ -n "$python" ] || die "PYTHON=$PYTHON cannot be used:${rejected:- not found}"
        return 0
    fi
    try python3.12
    try python3.13
    try python3
    try python
    for version in 3.12 3.13; do
        for candidate in \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python \
            "$HOME"/.pyenv/versions/"$version"*/bin/python \
            "$HOME"/.local/share/uv/python/cpython-"$version"*/bin/python3 \
            /usr/local/bin/python"$version" /opt/homebrew/bin/python"$version"; do
            try "$candidate"
        done
    done
    [ -n "$python" ] || die "no Python 3.12 or 3.13 found (Megatron-Core has wheels for these only).
Tried:${rejected:-
  python3.12, python3.13, python3, python: not found}
Install one and run again, for example:
  Debian 13, Ubuntu 24.04   apt install python3 python3-venv
  macOS                     brew install python@3.12
  pyenv                     pyenv install 3.12
or name one: make setup PYTHON=/path/to/python3.12"
}

make_venv() {
    if [ -e "$venv" ]; then
        if [ -e "$busy" ]; then
            say "an earlier install was cut short: starting again (what was downloaded is kept)"
        elif venv_is_here && [ -z "$(why_not "$venv/bin/python")" ] &&
            "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            say "bringing .venv up to date"
            return 0
        else
            say ".venv is of another place or Python: making a new one"
        fi
        rm -rf -- "$venv"
    fi
    find_python
    say "making .venv with $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
    mkdir "$venv"
    : >"$busy"
    "$python" -m venv "$venv"
}

# The installer itself, at the version and hashes that the lock has for it.
install_uv() {
    awk '/^uv==/ { take = 1 } take { print } take && !/\\$/ { exit }' requirements.lock \
        >"$venv/uv.lock.txt"
    [ -s "$venv/uv.lock.txt" ] || die "requirements.lock does not list uv: run make lock"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
        -r "$venv/uv.lock.txt"
}

# Runs a program (not a function: a signal must reach it). Where no terminal shows its progress bars,
# says every 15 s that it still works.
with_progress() {
    if [ -t 2 ]; then
        "$@"
        return
    fi
    "$@" &
    child=$!
    trap 'kill "$child" 2>/dev/null; exit 130' HUP INT TERM
    seconds=0
    while kill -0 "$child" 2>/dev/null; do
        sleep 1
        seconds=$((seconds + 1))
        [ $((seconds % 15)) -ne 0 ] || say "still installing, $seconds s"
    done
    wait "$child"
    trap - HUP INT TERM
}

start=$(date +%s)
make_venv
: >"$busy"
rm -f -- "$venv"/.minitron-[0-9]*
install_uv
# Named by path, so that a VIRTUAL_ENV of the caller's does not lead uv elsewhere.
into="--python=$venv/bin/python"
packages=$(grep -c '^[a-z].*==' requirements.lock)
say "installing $packages packages from requirements.lock. The first time on Linux that downloads"
say "about 3 GB, nearly all of it torch and its CUDA libraries (5.3 GB once installed)"
with_progress "$venv/bin/uv" pip sync "$into" --require-hashes --compile-bytecode requirements.lock
say "installing minitron itself, editable"
"$venv/bin/uv" pip install "$into" --quiet --no-deps --no-build-isolation --editable .
rm -f -- "$busy"
: >"$stamp"
say "done in $(($(date +%s) - start)) s; the command is .venv/bin/minitron"
