# shellcheck shell=bash
# Root file systems from Debian packages, without loop mounts. Source after common.sh and apt.sh.

readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
readonly MIRROR=http://deb.debian.org

# debootstrap_to ROOT PACKAGE_FILE SUITE…: Debian's minimum and the packages listed, in directory ROOT.
debootstrap_to() {
    local root=$1 packages suite path
    packages=$(sed 's/#.*//' "$2" | xargs | tr ' ' ,)
    shift 2
    for suite in "$@"; do
        path=debian
        [[ $suite != *-security ]] || path=debian-security
        echo "deb [signed-by=$KEYRING] $MIRROR/$path $suite main"
    done >"$root.sources"
    mmdebstrap --mode=root --variant=apt --skip=check/empty --include="$packages" \
        --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Retries "5"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='force-confold' \
        "$1" "$root" - <"$root.sources"
    rm -f "$root.sources" "$root/etc/apt/sources.list.d/0000"* "$root"/var/cache/apt/*.bin
    rm -rf "$root"/var/lib/apt/lists/*
}

# ext4_from ROOT IMAGE SIZE LABEL [mke2fs option…]: a sparse ext4 image of SIZE holding the tree at ROOT.
# Tables are written now: a lazy initialiser would steal time in the first minutes of every boot.
ext4_from() {
    local root=$1 image=$2 size=$3 label=$4
    shift 4
    rm -f "$image"
    mke2fs -q -F -t ext4 -L "$label" -m 0 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard \
        "$@" -d "$root" "$image" "$size"
}
