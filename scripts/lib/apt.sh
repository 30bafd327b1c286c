# shellcheck shell=bash
# Packages from Debian bookworm and bookworm-backports. Source after common.sh.

BACKPORTS_LIST=/etc/apt/sources.list.d/torpor-backports.sources

# apt_sources: make sure that apt knows bookworm-backports, and has an index at all.
apt_sources() {
    # shellcheck source=/dev/null
    [[ $(. /etc/os-release && echo "$VERSION_CODENAME") == bookworm ]] ||
        die "the build scripts know Debian bookworm only; packages for others are not mapped"
    if ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
        log "adding $BACKPORTS_LIST"
        cat >"$BACKPORTS_LIST" <<-END
		Types: deb
		URIs: http://deb.debian.org/debian
		Suites: bookworm-backports
		Components: main
		Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
		END
    fi
    # The kernel source is a package that only backports has: no candidate, no index.
    apt-cache madison linux-source-6.12 2>/dev/null | grep -q bookworm-backports ||
        step "apt-get update" apt_retry update
}

# apt_missing PACKAGE…: those that are not installed.
apt_missing() {
    local p
    for p in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || echo "$p"
    done
}

# apt_need [-t SUITE] PACKAGE…: install what is missing; silent when nothing is.
apt_need() {
    local suite=() missing
    if [[ $1 == -t ]]; then
        suite=(-t "$2")
        shift 2
    fi
    mapfile -t missing < <(apt_missing "$@")
    ((${#missing[@]})) || return 0
    need_root
    mkdir -p "$CACHE/locks"
    (
        flock 9
        apt_sources
        step "installing ${missing[*]}" apt_retry "${suite[@]}" install "${missing[@]}"
    ) 9>"$CACHE/locks/apt"
}

# apt_retry ARG…: apt-get without questions; a mirror that hiccups once should not fail a build.
apt_retry() {
    local run=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -y --no-install-recommends)
    "${run[@]}" "$@" || { sleep 3 && "${run[@]}" update && "${run[@]}" "$@"; }
}
