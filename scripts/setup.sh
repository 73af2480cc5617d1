#!/usr/bin/env bash
# From a bare machine to a working .venv: Python, frameworks, hvdloss, Horovod.
#
# Run by `make demo`, `make test` and `make lint`; does nothing when all is up to date.
# Asks no questions. Debian and Ubuntu packages are installed when this is root or has a
# password-less sudo; otherwise what is missing is named in one line.
#
#   PYTHON=python3.12 make test      another Python than the one found first
#   TORCH_INDEX=URL make test        another index for torch (an empty one: PyPI's own build)
#   NO_APT=1 make test               never touch the system's packages
#   HVDLOSS_CACHE=DIR make test      where built Horovod wheels are kept (~/.cache/hvdloss)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
stamp=$venv/.setup-stamp
torch=$(grep -E '^torch==' constraints.txt)
tensorflow=$(grep -E '^tensorflow_cpu==' constraints.txt)

say() { printf '\033[1msetup:\033[0m %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What the environment is made from. An edit of the sources needs no new setup: the package
# is installed editable.
state=$(cat constraints.txt pyproject.toml scripts/setup.sh hvdloss/cli/install/recipe.py | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

[ "$(uname -s)" = Linux ] || die "Horovod is built on Linux here; on Windows use WSL 2, elsewhere a container."

# 1. Python: the pinned versions exist for 3.11 to 3.13.
good='import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))'
find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if command -v "$name" >/dev/null && "$name" -c "$good" 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}
python=$(find_python)

# 2. System packages: only what is really missing.
missing=()
if [ -z "$python" ]; then
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13."
    missing+=(python3 python3-venv python3-dev)
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing+=(python3-dev)
fi
command -v c++ >/dev/null || missing+=(g++)
command -v make >/dev/null || missing+=(make)
command -v cmake >/dev/null || missing+=(cmake)
command -v mpicxx >/dev/null || missing+=(libopenmpi-dev)
command -v mpirun >/dev/null || missing+=(openmpi-bin)
command -v ssh >/dev/null || missing+=(openssh-client)
if [ ${#missing[@]} -gt 0 ]; then
    sudo=()
    if [ "$(id -u)" != 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo=(sudo -n); else sudo=(false); fi
    fi
    if [ -z "${NO_APT:-}" ] && command -v apt-get >/dev/null && [ "${sudo[0]:-}" != false ]; then
        say "installing ${missing[*]} (apt-get)"
        "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive sh -c \
            "apt-get update -qq && apt-get install -y -qq --no-install-recommends ${missing[*]}" >&2 ||
            die "apt-get could not install: ${missing[*]}"
    else
        die "missing: ${missing[*]}. Install them (Debian, Ubuntu: sudo apt-get install ${missing[*]}) and run this again."
    fi
    python=${python:-$(find_python)}
    [ -n "$python" ] || die "no Python 3.11, 3.12 or 3.13 was found. Name one: PYTHON=/path/to/python3 make ..."
fi

# 3. The virtual environment. One that is broken or of an unsupported Python is made again.
if ! "$venv/bin/python" -c "$good; import pip" 2>/dev/null; then
    say "making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

# 4. Frameworks, at the pinned versions. PyPI's torch for x86-64 brings 2 GB of CUDA; without a
# GPU the CPU build of the same version does the same.
index=()
if [ -n "${TORCH_INDEX-unset}" ] && ! command -v nvidia-smi >/dev/null; then
    resolved=$("${pip[@]}" install --quiet --dry-run --ignore-installed --no-deps --report - "$torch" 2>/dev/null |
        "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null || true)
    case $resolved in
        *+cpu) ;;
        *) index=(--extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}") ;;
    esac
elif [ -n "${TORCH_INDEX:-}" ]; then
    index=(--extra-index-url "$TORCH_INDEX")
fi
say "installing $torch, $tensorflow and hvdloss into $venv (some minutes the first time)"
"${pip[@]}" install -qq --constraint constraints.txt "${index[@]}" \
    "$torch" "$tensorflow" --editable '.[test,lint,examples,horovod]' >&2

# 5. Horovod, from the cache where this user has built it before.
say "installing Horovod (built once, then taken from the cache)"
"$venv/bin/hvdloss" install >&2

printf '%s\n' "$state" >"$stamp"
