# shellcheck shell=bash
# Shared by every build script: where things are, how progress is told, how the cache works.
# Source it; it changes no directory and starts nothing.

# Without this a failing command inside $(…) goes unnoticed.
shopt -s inherit_errexit

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${TORPOR_CACHE:-/var/cache/torpor}
export REPO CACHE

# Only the toolchain that is installed, never a download in the middle of a build.
export RUSTUP_AUTO_INSTALL=0
[[ :$PATH: == *:$HOME/.cargo/bin:* ]] || PATH=$HOME/.cargo/bin:$PATH
# A user's shell may leave sbin out; mke2fs, nft and modprobe live there.
[[ :$PATH: == *:/usr/sbin:* ]] || PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    log "error: $*"
    exit 1
}

# step TITLE CMD…: say what starts, run it with its output in a log file, say how long it took.
# On failure the end of the log is shown.
step() {
    local title=$1 out start=$SECONDS rc=0
    shift
    mkdir -p "$CACHE/logs"
    out=$(mktemp "$CACHE/logs/${0##*/}.XXXXXX")
    log "$title …"
    # Not "$@" || rc=$?: that would switch errexit off inside a function.
    set +e
    (set -e && "$@") </dev/null >"$out" 2>&1
    rc=$?
    set -e
    if ((rc != 0)); then
        tail -n 40 "$out" >&2
        die "$title failed (exit $rc) after $((SECONDS - start)) s; all of it: $out"
    fi
    rm -f "$out"
    log "$title: $((SECONDS - start)) s"
}

# key FILE|=TEXT…: short hash of the contents of the files (directories: all files in them) and texts.
key() {
    local input
    for input in "$@"; do
        case $input in
        =*) echo "$input" ;;
        *)
            [[ -e $input ]] || die "no such input: $input"
            find "$input" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | cut -d' ' -f1
            ;;
        esac
    done | sha256sum | cut -c1-16
}

# cached NAME CMD…: print the path $CACHE/NAME. If it is missing, CMD is run with the path of an empty
# temporary directory as its last argument, and what it leaves there becomes the artefact by one rename:
# a killed build leaves no half artefact. Builders of one NAME wait for each other.
# Older keys of the same artefact (NAME without its last "-key") are removed.
cached() {
    local path=$CACHE/$1 family=${1%-*} tmp
    shift
    if [[ ! -d $path ]]; then
        mkdir -p "$CACHE/locks" "$CACHE/tmp"
        (
            flock 9
            [[ ! -d $path ]] || exit 0
            find "$CACHE/tmp" -maxdepth 1 -name "$family.*" -exec rm -rf {} +
            tmp=$(mktemp -d "$CACHE/tmp/$family.XXXXXX")
            chmod 755 "$tmp"
            "$@" "$tmp" >&2
            mv "$tmp" "$path"
        ) 9>"$CACHE/locks/$family"
        prune "$family" "$path"
    fi
    touch "$path"
    echo "$path"
}

# prune FAMILY KEEP: of the artefacts FAMILY-<key>, keep KEEP and the two others used last.
prune() {
    find "$CACHE" -maxdepth 1 -type d -regex ".*/$1-[0-9a-f]+" ! -path "$2" -printf '%T@ %p\n' |
        sort -rn | tail -n +3 | cut -d' ' -f2- | xargs -r -d '\n' rm -rf
}

# need_root: apt, image builds and the package all need it.
need_root() { [[ $(id -u) == 0 ]] || die "must run as root (sudo $0 …)"; }
