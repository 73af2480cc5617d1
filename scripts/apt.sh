# Sourced by the scripts that install Debian's and Ubuntu's packages; they define `say`.

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else command -v sudo >/dev/null && sudo -n "$@"; fi
}

# Whether packages may, and can, be installed: NO_APT=1 says that they must not.
may_apt() {
    [ -z "${NO_APT:-}" ] && command -v apt-get >/dev/null && as_root true 2>/dev/null
}

apt_install() {
    local log status=0
    may_apt || return 1
    say "installing $* (apt-get)"
    log=$(mktemp)
    # A new machine may be updating itself: wait for the lock.
    as_root env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get update -qq &&
        apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends "$@"' sh "$@" >"$log" 2>&1 || status=$?
    if [ "$status" != 0 ]; then
        tail -n 20 "$log" >&2
        say "apt-get failed; all it printed is in $log"
        return 1
    fi
    rm -f "$log"
}
