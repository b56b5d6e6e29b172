#!/bin/sh
# usage: scripts/venv.sh DIR EXTRAS CONSTRAINTS
# Makes the virtual environment DIR with this project (editable) and EXTRAS in it, once: a stamp, written last, holds what
# it was made from. An unfinished environment is made anew, one of older pins is brought up to date in place.
set -eu
cd "$(dirname "$0")/.."
venv=$1 extras=$2 constraints=$3
oldest=12 newest=14 # minor versions of Python 3 that the project supports

usable() { # is "$1" a Python of a supported version that can make a virtual environment? prints its minor version
    "$1" -c "
import sys
if not ((3, $oldest) <= sys.version_info[:2] <= (3, $newest)): sys.exit(1)
import ensurepip, ssl, venv
print(sys.version_info[1])" 2>/dev/null
}

find_python() { # the newest usable interpreter on the PATH, under pyenv, or known to uv
    best= best_minor=0
    for python in python3 python python3.12 python3.13 python3.14 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 \
        "$(command -v uv >/dev/null && uv python find --no-project ">=3.$oldest" 2>/dev/null || true)"; do
        if [ -n "$python" ] && minor=$(usable "$python") && [ "$minor" -gt "$best_minor" ]; then
            best=$python best_minor=$minor
        fi
    done
    if [ -z "$best" ] && command -v uv >/dev/null; then
        echo "No Python 3.$oldest to 3.$newest found; asking uv for one." >&2
        uv python install --quiet "3.$oldest" >&2 && best=$(uv python find --no-project "3.$oldest") || best=
    fi
    echo "$best"
}

hash_of() { # one line that changes with what the environment is made from
    cat pyproject.toml constraints/*.txt "$0" | cksum | tr ' ' -
}

want="$extras $(hash_of)"
stamp="$venv/.complete"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && "$venv/bin/python" -c "" 2>/dev/null; then
    exit 0
fi

if ! [ -f "$stamp" ] || ! "$venv/bin/python" -c "" 2>/dev/null; then
    python=$(find_python)
    if [ -z "$python" ]; then
        echo "No Python 3.$oldest to 3.$newest that can make a virtual environment was found (looked on the PATH, under" \
            "pyenv and with uv). Install one with its venv, ensurepip and ssl modules (Debian: python3-venv)." >&2
        exit 1
    fi
    echo "Making $venv with $("$python" --version)."
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"
echo "Installing packages into $venv; this takes about a minute, once."
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$extras]"
echo "$want" > "$stamp"
