#!/usr/bin/env bash
# What `make test-hosts` needs of the system besides what setup.sh installs: sshd, WireGuard's tools, ip and tc.
#
# Asks no questions. Installs Debian and Ubuntu packages when this is root or has a password-less sudo, and
# never starts a service; otherwise says in one line what is missing, and the tests skip what needs it.
#
#   NO_APT=1 make test-hosts         never touch the system's packages
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin # where Debian keeps sshd
say() { printf 'hosts: %s\n' "$*" >&2; }

needed=()
command -v ip >/dev/null && command -v tc >/dev/null || needed+=(iproute2)
command -v sshd >/dev/null || needed+=(openssh-server)
command -v ssh >/dev/null && command -v ssh-keygen >/dev/null || needed+=(openssh-client)
command -v hostname >/dev/null || needed+=(hostname)
command -v wg >/dev/null || needed+=(wireguard-tools)
# WireGuard in user space, where the kernel has none.
command -v wireguard-go >/dev/null || modinfo wireguard >/dev/null 2>&1 || [ -d /sys/module/wireguard ] ||
    needed+=(wireguard-go)

. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"

# A package's service is not started: policy-rc.d is how Debian is told (invoke-rc.d(8)). The rig starts
# sshd by itself, in its own namespaces.
apt_install_quietly() {
    local policy=/usr/sbin/policy-rc.d made='' status=0
    may_apt || return 1
    if [ ! -e "$policy" ]; then
        made=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    apt_install "$@" || status=$?
    [ -z "$made" ] || as_root rm -f "$policy"
    return "$status"
}
if [ ${#needed[@]} -gt 0 ] && ! apt_install_quietly "${needed[@]}"; then
    say "MISSING: ${needed[*]}; tests that need them are SKIPPED"
fi
[ "$(id -u)" = 0 ] || say "NOT ROOT: hosts cannot be made out of namespaces, their tests are SKIPPED"
