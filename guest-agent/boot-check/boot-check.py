"""Inside the guest: asks PID 1 what only a machine of its own can show, and ends it."""

import base64
import json
import os
import socket
import struct
import time


def connect():
    while True:
        try:
            stream = socket.socket(socket.AF_UNIX)
            stream.connect("/dev/agent.sock")
            return stream
        except OSError:
            time.sleep(0.05)


def receive(stream, length):
    data = b""
    while len(data) < length:
        part = stream.recv(length - len(data))
        assert part, "the agent closed the connection"
        data += part
    return data


def ask(**request):
    payload = json.dumps(request).encode()
    stream = connect()
    stream.sendall(struct.pack("<BI", 1, len(payload)) + payload)
    output = b""
    while True:
        kind, length = struct.unpack("<BI", receive(stream, 5))
        data = receive(stream, length)
        if kind in (2, 3):
            answer = json.loads(data)
            assert kind == 2, answer
            return answer, output.decode()
        if kind in (6, 7):
            output += data


def shell(script):
    answer, output = ask(op="exec", argv=["/bin/sh", "-c", script])
    return output


def check(what, condition, found=""):
    print("BOOT-CHECK", "ok" if condition else "FAILED", what, found if not condition else "", flush=True)
    return condition


def main():
    ok = check("ping", ask(op="ping")[0]["kind"] == "pong")
    # The root file system grows beside everything else.
    grown = False
    for _ in range(200):
        status = os.statvfs("/")
        grown = status.f_blocks * status.f_frsize > 5 << 30
        if grown:
            break
        time.sleep(0.05)
    ok &= check("root file system grown to the disk", grown)
    mounts = shell("cat /proc/mounts")
    for point in "/proc /sys /dev /dev/pts /dev/shm /dev/mqueue /run /sys/fs/cgroup".split():
        ok &= check(f"{point} mounted", f" {point} " in mounts, mounts)
    for what, script, expected in [
        ("host name", "hostname", "sleepy"),
        ("loopback", "ip addr show lo", "inet 127.0.0.1/8"),
        ("address", "ip addr show eth0", "inet 172.31.0.2/30"),
        ("interface up", "ip link show eth0", "state UP"),
        ("route", "ip route", "default via 172.31.0.1 dev eth0"),
        ("neighbour", "ip neigh", "172.31.0.1 dev eth0 lladdr 06:00:ac:1f:00:01 PERMANENT"),
        ("IPv6 off", "cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1"),
        ("open files", "ulimit -Sn", "1024"),
        ("descriptors", "echo x >/dev/stderr; cat /dev/fd/0; ls -l /dev/fd/1", "x"),
    ]:
        found = shell(script)
        ok &= check(what, expected in found, found)
    _, found = ask(op="exec", argv=["tty"], tty={"rows": 24, "cols": 80})
    ok &= check("terminal", found.startswith("/dev/pts/"), found)
    shell("(sleep 0.1 &); exit 0")
    time.sleep(1)
    found = shell("cat /proc/[0-9]*/stat 2>/dev/null | grep ') Z ' ; true")
    ok &= check("orphans reaped", found == "", found)
    for hours in (1, -2):
        wall = time.time_ns() + hours * 3600 * 10**9
        ask(op="resync", wall_unix_ns=wall, entropy=base64.b64encode(os.urandom(32)).decode())
        off_ms = abs(time.time_ns() - wall) / 1e6
        ok &= check(f"clock stepped by {hours} h", off_ms < 1000, f"off by {off_ms} ms")
    ok &= check("quiesce", ask(op="quiesce")[0]["kind"] == "done")
    ask(op="exec", argv=["/bin/sh", "-c", "trap '' TERM; sleep 1000"], background=True)
    if ok:
        print("BOOT-CHECK PASSED", flush=True)
    ask(op="shutdown", reboot=True)
    time.sleep(1000)


main()
