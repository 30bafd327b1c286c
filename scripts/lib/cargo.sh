# shellcheck shell=bash
# The Rust parts: which toolchain, which target directories, which binaries. Source after common.sh.

readonly GUEST_TRIPLE=x86_64-unknown-linux-gnu
readonly HOST_BINARIES=(torpord torpor torpor-vmm)
PROFILE=${TORPOR_PROFILE:-release}

target_dir() { echo "${CARGO_TARGET_DIR:-$REPO/target}"; }

# profile_dir: cargo's folder for PROFILE; only `dev` is not called what it is.
profile_dir() { if [[ $PROFILE == dev ]]; then echo debug; else echo "$PROFILE"; fi; }

# need_cargo: a toolchain as rust-toolchain.toml names it. Never downloaded here: that is the developer's choice.
need_cargo() {
    command -v cargo >/dev/null || die "no cargo: install Rust $(rust_version) first (https://rustup.rs)"
    (cd "$REPO" && cargo --version >/dev/null 2>&1) ||
        die "Rust $(rust_version) is not installed (rustup toolchain install $(rust_version))"
    command -v cc >/dev/null || apt_need build-essential
}

rust_version() { sed -nE 's/^channel = "(.*)"/\1/p' "$REPO/rust-toolchain.toml"; }

# cargo_loud ARG…: cargo in the repository with its progress on stderr, told only if there is something to do.
cargo_loud() { (cd "$REPO" && cargo "$@" 1>&2); }

# linted CMD…: have cargo compile our own crates with clippy, as `cargo clippy` does, where a warning is an error. What comes
# out can be run, so that checking and testing need one build instead of two.
linted() { RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-Dwarnings__CLIPPY_HACKERY__ "$@"; }
export -f linted

build_host_binaries() {
    local bins=() b start=$SECONDS
    for b in "${HOST_BINARIES[@]}"; do bins+=(--bin "$b"); done
    CARGO_TARGET_DIR=$(target_dir) cargo_loud build --quiet --profile "$PROFILE" "${bins[@]}"
    ((SECONDS - start < 3)) || log "cargo build (${HOST_BINARIES[*]}): $((SECONDS - start)) s"
}

# build_guest: print the path of a static torpor-guest. Its own target directory: other RUSTFLAGS in a shared
# one would rebuild every crate at each change of mind.
build_guest() {
    local dir start=$SECONDS
    dir=$(target_dir)/guest
    RUSTFLAGS="-C target-feature=+crt-static" CARGO_TARGET_DIR=$dir \
        cargo_loud build --quiet --profile "$PROFILE" --target "$GUEST_TRIPLE" --bin torpor-guest
    ((SECONDS - start < 3)) || log "cargo build (torpor-guest): $((SECONDS - start)) s"
    echo "$dir/$GUEST_TRIPLE/$(profile_dir)/torpor-guest"
}

# need_nextest: cargo-nextest, from source if it is missing (about 5 minutes, once per machine).
need_nextest() {
    command -v cargo-nextest >/dev/null || step "installing cargo-nextest (about 5 minutes)" \
        cargo install --locked --root "${CARGO_HOME:-$HOME/.cargo}" cargo-nextest
}
