# shellcheck shell=bash
# The virtual bare-metal host: one QEMU per clone of the repository. Source after common.sh and apt.sh.
#
# STATE holds everything about it: disk.qcow2 (thrown away at each start), qemu.pid, port, serial.log,
# ssh (control socket), image and templates (what it was started with), synced and deb (what it was given).

STATE=${TORPOR_STATE:-/var/tmp/torpor-testhost}/$(printf %s "$REPO" | sha256sum | cut -c1-10)
# An emulated CPU was seen to lose its timer while booting and then to sleep for ever; a second boot is cheaper than waiting.
readonly BOOT_LIMIT_SECS=150
# Templates that a running host can be given after its first; then it has to be started afresh.
readonly SWAP_SLOTS=8
readonly TEMPLATES_MOUNT=/usr/share/torpor/templates

need_qemu() {
    local have
    have=$(dpkg-query -W -f '${Version}' qemu-system-x86 2>/dev/null || true)
    if dpkg --compare-versions "${have:-0}" lt 1:10; then
        # bookworm's 7.2 oopses the host kernel now and then under multi-threaded TCG.
        [[ -z $have ]] || log "qemu $have is older than 10: upgrading from bookworm-backports"
        need_root
        apt_sources
        step "installing qemu-system-x86 from bookworm-backports" \
            apt_retry -t bookworm-backports install qemu-system-x86 qemu-utils
    fi
    apt_need openssh-client rsync socat
}

# host_pid: the pid of our QEMU if it runs; the pid file alone proves nothing.
host_pid() {
    local pid
    pid=$(cat "$STATE/qemu.pid" 2>/dev/null) || return 1
    tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "file=$STATE/disk.qcow2" || return 1
    echo "$pid"
}

# host_start IMAGE_DIR TEMPLATES_IMAGE: boot a fresh host and wait until it has settled.
host_start() {
    local image=$1 templates=$2 begin=$SECONDS try
    echo "$image" >"$STATE/image"
    echo "$templates" >"$STATE/templates"
    log "booting the virtual host (20-40 s under emulation) …"
    for try in 1 2 3; do
        if host_boot "$image" "$templates"; then break; fi
        tail -n 5 "$STATE/serial.log" >&2 || true
        ((try < 3)) || die "the virtual host does not boot; see $STATE/serial.log and qemu.log"
        log "no ssh answer within $BOOT_LIMIT_SECS s; booting again"
        host_stop
    done
    # Not by fstab: under emulation udev may need longer than any sensible time-out.
    [[ -z $templates ]] || host_sh "mount -o ro /dev/vdb $TEMPLATES_MOUNT"
    log "virtual host is up: $((SECONDS - begin)) s"
}

# host_boot IMAGE_DIR TEMPLATES_IMAGE: one try, from a fresh disk.
host_boot() {
    rm -rf "$STATE"/{disk.qcow2,serial.log,synced,deb,ssh,swaps}
    qemu-img create -q -f qcow2 -b "$1/host.ext4" -F raw "$STATE/disk.qcow2"
    echo $((20000 + RANDOM % 12000)) >"$STATE/port"
    write_ssh_config "$1"
    launch_qemu "$1" "$2" && host_wait "$SECONDS"
}

launch_qemu() {
    local image=$1 templates=$2 disk=() slots=() n
    for ((n = 1; n <= SWAP_SLOTS; n++)); do slots+=(-device "pcie-root-port,id=slot$n,chassis=$n"); done
    [[ -z $templates ]] || disk=(-drive "file=$templates,format=raw,if=virtio,readonly=on,cache=unsafe")
    qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu EPYC,+svm \
        -smp "${TORPOR_TESTHOST_CPUS:-1}" -m "${TORPOR_TESTHOST_MEM:-$(default_mem_mib)}" \
        -display none -monitor none -no-reboot -serial "file:$STATE/serial.log" \
        -kernel "$image/vmlinuz" -initrd "$image/initrd.img" \
        -append "root=/dev/vda rw console=ttyS0 quiet panic=-1" \
        -drive "file=$STATE/disk.qcow2,format=qcow2,if=virtio,cache=unsafe" "${disk[@]}" \
        -nic "user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:$(cat "$STATE/port")-:22" \
        -device virtio-rng-pci "${slots[@]}" -qmp "unix:$STATE/qmp,server=on,wait=off" -daemonize -pidfile "$STATE/qemu.pid" >"$STATE/qemu.log" 2>&1 8>&- 9>&-
}

default_mem_mib() {
    local total_kib
    total_kib=$(awk '/^MemTotal:/ { print $2 }' /proc/meminfo)
    if ((total_kib >= 16 * 1000 * 1000)); then echo 8192; else echo 4096; fi
}

# host_wait BEGIN: until ssh answers and systemd has nothing queued; fails if that takes too long.
host_wait() {
    local state
    until host_connect; do
        host_pid >/dev/null && ((SECONDS - $1 < BOOT_LIMIT_SECS)) || return 1
        sleep 0.5
    done
    state=$(timeout 120 ssh -F "$STATE/ssh_config" host systemctl is-system-running --wait || true)
    [[ $state == running ]] || log "warning: systemd says '$state' ($0 ssh systemctl --failed)"
}

# host_swap_templates DISK: plug another templates disk in and mount it over the one before, which machines
# made from it keep. Fails when no slot is left.
host_swap_templates() {
    local n
    n=$(($(cat "$STATE/swaps" 2>/dev/null || echo 0) + 1))
    ((n <= SWAP_SLOTS)) || return 1
    echo "$n" >"$STATE/swaps"
    qmp '{"execute":"blockdev-add","arguments":{"node-name":"templates'"$n"'","driver":"raw","read-only":true,
          "file":{"driver":"file","filename":"'"$1"'"}}}' || return 1
    qmp '{"execute":"device_add","arguments":{"driver":"virtio-blk-pci","drive":"templates'"$n"'","bus":"slot'"$n"'",
          "serial":"templates'"$n"'"}}' || return 1
    host_sh "for i in \$(seq 200); do dev=\$(grep -lx templates$n /sys/block/vd*/serial | cut -d/ -f4);
        [ -z \"\$dev\" ] || exec mount -o ro /dev/\$dev $TEMPLATES_MOUNT; sleep 0.1; done; exit 1" || return 1
    echo "$1" >"$STATE/templates"
    log "template changed: new templates disk plugged in"
}

# qmp COMMAND: one command to QEMU's control socket; fails if the answer is an error.
qmp() {
    local answer
    answer=$(printf '%s\n' '{"execute":"qmp_capabilities"}' "$(tr -d '\n' <<<"$1")" |
        socat -t 5 - "UNIX-CONNECT:$STATE/qmp")
    [[ $answer != *'"error"'* ]] || {
        log "qemu: $answer"
        return 1
    }
}

# write_ssh_config: `ssh -F $STATE/ssh_config host` and rsync both go through it.
# The host key was made with the image, so that nothing has to be trusted on first sight.
write_ssh_config() {
    local image=$1
    cat >"$STATE/ssh_config" <<-END
	Host host
	HostName 127.0.0.1
	Port $(cat "$STATE/port")
	User root
	IdentityFile $image/id
	IdentitiesOnly yes
	BatchMode yes
	LogLevel ERROR
	HostKeyAlias torpor-host
	UserKnownHostsFile $image/known_hosts
	ControlPath $STATE/ssh
	ServerAliveInterval 30
	ServerAliveCountMax 20
	SendEnv TORPOR_E2E_* CI
	END
}

# host_connect: the shared ssh connection, so that each command after it costs no handshake.
# It is started on its own, with nothing of the caller's open: a pipe it kept would never see its end.
host_connect() {
    host_ssh -O check 2>/dev/null && return
    host_ssh -o ConnectTimeout=5 -o ControlMaster=yes -N -f </dev/null >/dev/null 2>"$STATE/ssh.log" 8>&- 9>&-
}

# host_ssh [ssh option…] [-- COMMAND LINE]
host_ssh() {
    local opts=()
    while (($#)) && [[ $1 != -- ]]; do
        opts+=("$1")
        shift
    done
    (($# == 0)) || shift
    ssh -F "$STATE/ssh_config" "${opts[@]}" host "$@"
}

# host_sh COMMAND LINE: without stdin, for the scripts' own needs.
host_sh() { host_ssh -T -- "$@" </dev/null; }

host_stop() {
    local pid _
    pid=$(host_pid) || return 0
    host_ssh -O exit >/dev/null 2>&1 || true
    kill "$pid"
    for _ in {1..100}; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    if [[ $(host_pid || true) == "$pid" ]]; then kill -9 "$pid"; fi
    rm -f "$STATE/qemu.pid"
}
