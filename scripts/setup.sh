#!/usr/bin/env bash
# From a bare machine to a working .venv: Python, frameworks, hvdloss, Horovod.
#
# Run by `make demo`, `make test` and `make lint`; does nothing when all is up to date.
# Asks no questions. Debian and Ubuntu packages are installed when this is root or has a
# password-less sudo; otherwise what is missing is named in one line. MPI and a system CMake are
# not needed to go on: Horovod is then built without MPI, with a CMake from PyPI.
#
#   scripts/setup.sh --torch         PyTorch and hvdloss alone: enough for a first run, without a compiler
#   PYTHON=python3.12 make test      another Python than the one found first
#   TORCH_INDEX=URL make test        another index for torch (an empty one: PyPI's own build)
#   NO_APT=1 make test               never touch the system's packages
#   HVDLOSS_CACHE=DIR make test      where built Horovod wheels are kept (~/.cache/hvdloss)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch_only=
[ "${1:-}" != --torch ] || torch_only=yes
venv=.venv
stamp=$venv/.setup-stamp
torch=$(grep -E '^torch==' constraints.txt)
tensorflow=$(grep -E '^tensorflow_cpu==' constraints.txt)

if [ -t 2 ]; then bold=$'\033[1m' plain=$'\033[0m'; else bold='' plain=''; fi
say() { printf '%ssetup:%s %s\n' "$bold" "$plain" "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What the environment is made from, and where. An edit of the sources needs no new setup: the
# package is installed editable.
state=$(pwd -P | cat - constraints.txt pyproject.toml scripts/setup.sh hvdloss/cli/install/{recipe.py,patches/*} | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

if [ -n "$torch_only" ]; then
    say "first $torch and hvdloss go into $venv (about a minute): enough for training on several ranks." \
        "TensorFlow and Horovod, which is compiled, follow in the background (some four minutes)."
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
needed=()
useful=()
if [ -z "$python" ]; then
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13."
    needed+=(python3 python3-venv python3-dev)
else
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || needed+=("$name-venv")
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || needed+=("$name-dev")
fi
if [ -z "$torch_only" ]; then
    command -v c++ >/dev/null || needed+=(g++)
    command -v make >/dev/null || needed+=(make)
    command -v cmake >/dev/null || useful+=(cmake)
    command -v mpicxx >/dev/null || useful+=(libopenmpi-dev)
    command -v mpirun >/dev/null || useful+=(openmpi-bin)
    command -v ssh >/dev/null || useful+=(openssh-client) # Open MPI looks for it even on one machine
fi

. scripts/apt.sh # what apt-get prints is shown only if it fails
if [ $((${#needed[@]} + ${#useful[@]})) -gt 0 ] && ! apt_install "${needed[@]}" "${useful[@]}"; then
    [ ${#needed[@]} -eq 0 ] || die "missing: ${needed[*]}. Install them (Debian, Ubuntu: sudo apt-get install ${needed[*]} ${useful[*]}) and run this again."
    say "going on without ${useful[*]}"
fi
python=${python:-$(find_python)}
[ -n "$python" ] || die "no Python 3.11, 3.12 or 3.13 was found. Name one: PYTHON=/path/to/python3 make ..."

# Gloo looks up the machine's own name. Installers write it into /etc/hosts; bare images may not have it.
for entry in "127.0.0.1 localhost" "127.0.1.1 $(uname -n)"; do
    if ! getent hosts "${entry#* }" >/dev/null; then
        say "adding '$entry' to /etc/hosts: the name does not resolve, and Horovod needs it"
        printf '%s\n' "$entry" | as_root tee -a /etc/hosts >/dev/null 2>&1 ||
            say "could not; without that line no ranks can start over Gloo"
    fi
done

# 3. The virtual environment. One that is broken, of an unsupported Python, or was moved here with
# its scripts still naming the old place, is made again.
if ! "$venv/bin/python" -c "$good; import pip" 2>/dev/null || ! grep -qsF "$(pwd -P)/$venv" "$venv/bin/activate"; then
    say "making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

# 4. Frameworks, at the pinned versions. PyPI's torch for x86-64 brings 2 GB of CUDA; without a
# GPU the CPU build of the same version does the same.
index=()
if [ -n "${TORCH_INDEX-unset}" ] && ! command -v nvidia-smi >/dev/null; then
    # Asked without downloading anything: pip 23's --dry-run would fetch the whole wheel.
    versions=$("${pip[@]}" index versions torch 2>/dev/null || true)
    case $versions in
        *" ${torch#torch==}+cpu"*) ;; # pip is set up here with an index that has it
        *) index=(--extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}") ;;
    esac
elif [ -n "${TORCH_INDEX:-}" ]; then
    index=(--extra-index-url "$TORCH_INDEX")
fi
if [ -n "$torch_only" ]; then
    "${pip[@]}" install -qq --constraint constraints.txt "${index[@]}" "$torch" --editable '.[examples]' >&2
    exit 0
fi
say "installing $torch, $tensorflow and hvdloss into $venv (some minutes the first time)"
"${pip[@]}" install -qq --constraint constraints.txt "${index[@]}" \
    "$torch" "$tensorflow" --editable '.[test,lint,examples,horovod,docs]' >&2

# 5. Horovod, from the cache where this user has built it before.
say "installing Horovod (built once, then taken from the cache)"
"$venv/bin/hvdloss" install >&2

printf '%s\n' "$state" >"$stamp"
