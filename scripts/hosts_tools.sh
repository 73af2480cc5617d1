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

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else command -v sudo >/dev/null && sudo -n "$@"; fi
}

# A package's service is not started: policy-rc.d is how Debian is told (invoke-rc.d(8)). The rig starts
# sshd by itself, in its own namespaces.
apt_install() {
    local log policy=/usr/sbin/policy-rc.d made='' status=0
    [ -z "${NO_APT:-}" ] && command -v apt-get >/dev/null && as_root true 2>/dev/null || return 1
    say "installing $* (apt-get)"
    log=$(mktemp)
    if [ ! -e "$policy" ]; then
        made=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    as_root env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get update -qq &&
        apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends "$@"' sh "$@" >"$log" 2>&1 || status=$?
    [ -z "$made" ] || as_root rm -f "$policy"
    if [ "$status" != 0 ]; then
        tail -n 20 "$log" >&2
        say "apt-get failed; all it printed is in $log"
        return 1
    fi
    rm -f "$log"
}
if [ ${#needed[@]} -gt 0 ] && ! apt_install "${needed[@]}"; then
    say "MISSING: ${needed[*]}; tests that need them are SKIPPED"
fi
[ "$(id -u)" = 0 ] || say "NOT ROOT: hosts cannot be made out of namespaces, their tests are SKIPPED"
