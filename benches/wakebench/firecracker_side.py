"""Firecracker with the same kernel, root disk and guest agent, in a network namespace of its own."""
import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time

from wakebench import cache, guest_channel
from wakebench.guests import first_byte

TEMPLATE = pathlib.Path("/usr/share/torpor/templates/base")
GUEST_ADDRESS, TAP_CIDR = "172.31.0.2", "172.31.0.1/30"
# What torpor-guest has as permanent neighbours.
GUEST_MAC, TAP_MAC = "06:00:ac:1f:00:02", "06:00:ac:1f:00:01"
CLONE_NEWNET = 0x40000000


def sh(command):
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


def api(path, method, route, body):
    """One call of Firecracker's API socket."""
    connection = http.client.HTTPConnection("firecracker", timeout=300)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    connection.request(method, route, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status >= 300:
        raise RuntimeError(f"firecracker {route}: {response.status} {text!r}")


def _listens(path):
    """Whether a connect to the socket works: the file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


class FirecrackerSide:
    """One guest, paused to a snapshot and loaded again.

    `how` is "fresh" (a new process loads the memory file), "prestarted" (one that was started before does), "full" (a new
    process, and every snapshot is a full one), "paused" (the process stays, and goes on), or the path of a handler that
    serves page faults over userfaultfd to a new process: Firecracker's examples `uffd_on_demand_handler` and
    `uffd_fault_all_handler`."""

    def __init__(self, guest, binary, how):
        self.guest, self.binary, self.how = guest, binary, how
        self.name = "firecracker-" + pathlib.Path(how).name.removesuffix("_handler").replace("_", "-")
        self.cycle, self.process, self.spare, self.handler, self.stays = 0, None, None, None, False
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="fc-bench-", dir="/var/tmp"))
        self.namespace = self.directory.name.replace("fc-bench-", "fcb-")
        sh(f"ip netns add {self.namespace}")
        sh(f"ip -n {self.namespace} tuntap add tap0 mode tap && ip -n {self.namespace} addr add {TAP_CIDR} dev tap0 && "
           f"ip -n {self.namespace} link set tap0 address {TAP_MAC} up && ip -n {self.namespace} neigh replace {GUEST_ADDRESS} "
           f"lladdr {GUEST_MAC} dev tap0 nud permanent")
        sh(f"cp --sparse=always {TEMPLATE}/rootfs.ext4 {self.directory}/rootfs.ext4")
        try:
            self._boot()
        except BaseException:
            self.close()
            raise

    def _spawn(self):
        socket_path = self.directory / f"api-{time.monotonic_ns()}.sock"
        # Straight into the namespace: `ip netns exec` would be charged to Firecracker.
        process = subprocess.Popen([self.binary, "--api-sock", socket_path, "--log-path", "/dev/null"],
                                   cwd=self.directory, preexec_fn=self._enter, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not _listens(socket_path):
            time.sleep(0.0005)
        return process, str(socket_path)

    def _boot(self):
        self.process, path = self._spawn()
        vsock = self.directory / "v.sock"
        args = "console=ttyS0 reboot=k panic=-1 pci=off quiet nowatchdog mitigations=off root=/dev/vda rw " \
               "init=/usr/local/bin/torpor-guest"
        api(path, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": self.guest.mem_mib,
                                             "track_dirty_pages": True})
        api(path, "PUT", "/boot-source", {"kernel_image_path": str(TEMPLATE / "vmlinux"), "boot_args": args})
        api(path, "PUT", "/drives/root", {"drive_id": "root", "path_on_host": str(self.directory / "rootfs.ext4"),
                                          "is_root_device": True, "is_read_only": False})
        api(path, "PUT", "/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": "tap0",
                                                      "guest_mac": GUEST_MAC})
        api(path, "PUT", "/vsock", {"guest_cid": 3, "uds_path": str(vsock)})
        api(path, "PUT", "/actions", {"action_type": "InstanceStart"})
        self.socket_path = path
        if self.guest.prepare:
            raise RuntimeError(f"this guest must be prepared over a network; Firecracker's has none: {self.guest}")
        guest_channel.call(str(vsock), {"op": "exec", "argv": ["/bin/sh", "-c", self.guest.command],
                                        "background": True})
        deadline = time.monotonic() + 300
        while True:
            try:
                return self.request()
            except (OSError, RuntimeError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _enter(self):
        with open(f"/run/netns/{self.namespace}") as namespace:
            if cache.LIBC.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {self.namespace}")

    def _socket(self):
        """A TCP socket of the guest's namespace."""
        made = []

        def make():
            # The thread ends with its namespace, ours is untouched.
            self._enter()
            made.append(socket.socket())
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]

    def request(self):
        made = self._socket()
        return first_byte((GUEST_ADDRESS, self.guest.port), self.guest, time.monotonic, in_namespace=lambda: made)[0]

    def pause(self, stays=False):
        """Pause and write a snapshot: full the first time, then diffs merged into it as its users do. The process ends
        unless it `stays`."""
        self.stays = stays
        kind = "Diff" if self.cycle and self.how != "full" else "Full"
        memory = self.directory / ("diff.mem" if kind == "Diff" else "full.mem")
        memory.unlink(missing_ok=True)
        start = time.monotonic()
        api(self.socket_path, "PATCH", "/vm", {"state": "Paused"})
        api(self.socket_path, "PUT", "/snapshot/create", {"snapshot_type": kind, "mem_file_path": str(memory),
                                                          "snapshot_path": str(self.directory / "state")})
        elapsed = (time.monotonic() - start) * 1e3
        written = memory.stat().st_blocks * 512
        if not stays:
            self._end(self.process)
        if kind == "Diff":
            self._merge(memory)
        if self.how == "prestarted" and not stays:
            self.spare = self._spawn()
        return {"kind": "pause", "system": self.name, "snapshot": kind, "cycle": self.cycle, "pause_ms": elapsed,
                "freeze_ms": elapsed, "written_bytes": written}

    def _merge(self, diff):
        """Lay a sparse diff over the full memory file."""
        with open(diff, "rb") as source, open(self.directory / "full.mem", "r+b") as target:
            end, offset = diff.stat().st_size, 0
            while offset < end:
                try:
                    data = os.lseek(source.fileno(), offset, os.SEEK_DATA)
                except OSError:
                    return
                hole = os.lseek(source.fileno(), data, os.SEEK_HOLE)
                source.seek(data)
                target.seek(data)
                shutil.copyfileobj(_Bounded(source, hole - data), target, 1 << 20)
                offset = hole

    def _end(self, process):
        for ended in (process, self.handler):
            if ended:
                ended.kill()
                ended.wait()
        self.handler = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.directory / "v.sock")

    def evict(self):
        os.sync()
        cache.evict([self.directory / "full.mem", self.directory / "state"])

    def wake(self):
        self.cycle += 1
        client = self._socket()
        start = time.monotonic()
        if self.stays:
            api(self.socket_path, "PATCH", "/vm", {"state": "Resumed"})
        else:
            self._load()
        loaded = time.monotonic() - start
        elapsed = loaded + first_byte((GUEST_ADDRESS, self.guest.port), self.guest, time.monotonic,
                                      in_namespace=lambda: client)[0]
        return {"kind": "wake", "system": self.name, "cycle": self.cycle, "wake_ms": elapsed * 1e3,
                "stages_ms": {"load": loaded * 1e3}}

    def _load(self):
        backend = {"backend_type": "File", "backend_path": str(self.directory / "full.mem")}
        if "/" in self.how:
            faults = self.directory / f"uffd-{time.monotonic_ns()}.sock"
            self.handler = subprocess.Popen([self.how, faults, self.directory / "full.mem"], stdin=subprocess.DEVNULL,
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not faults.exists():
                time.sleep(0.0005)
            backend = {"backend_type": "Uffd", "backend_path": str(faults)}
        self.process, self.socket_path = self.spare if self.how == "prestarted" else self._spawn()
        api(self.socket_path, "PUT", "/snapshot/load", {
            "snapshot_path": str(self.directory / "state"), "track_dirty_pages": True, "resume_vm": True,
            "mem_backend": backend})

    def wake_counted(self):
        return self.wake()

    def close(self):
        for process in {self.process, self.spare and self.spare[0]} - {None}:
            self._end(process)
        sh(f"ip netns del {self.namespace}")
        shutil.rmtree(self.directory)


class _Bounded:
    """The next `left` bytes of a file."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def read(self, size):
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data
