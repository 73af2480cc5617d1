#!/usr/bin/env bash
# What `make test-docker` needs of the system besides what setup.sh installs: buildah and podman with runc, which
# build and run images without a daemon; debootstrap, which makes a base image where no registry is; iproute2.
#
# Asks no questions. Installs Debian and Ubuntu packages when this is root or has a password-less sudo;
# otherwise says in one line what is missing, and the tests skip.
#
#   NO_APT=1 make test-docker        never touch the system's packages
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
say() { printf 'docker: %s\n' "$*" >&2; }

needed=()
for program in buildah podman runc debootstrap; do
    command -v "$program" >/dev/null || needed+=("$program")
done
# podman's own networks, and the names in them.
[ -x /usr/lib/podman/netavark ] || needed+=(netavark)
[ -x /usr/lib/podman/aardvark-dns ] || needed+=(aardvark-dns)
command -v iptables >/dev/null || needed+=(iptables)

. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"
if [ ${#needed[@]} -gt 0 ] && ! apt_install "${needed[@]}"; then
    say "MISSING: ${needed[*]}; the image's tests are SKIPPED"
fi
[ "$(id -u)" = 0 ] || say "NOT ROOT: the image is built and run by root here, its tests are SKIPPED"
