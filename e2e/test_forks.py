"""Forks of a machine in use: a redis that serves a client, eight children, and for each its own randomness."""
import contextlib
import json
import pathlib
import socket
import threading

import pytest
import torpor
from test_inside import transfer
from test_snapshots import adopt
from test_templates import program_and_libraries
from test_traffic import address

REDIS_PORT = 6379
RANDOM_PORT = 9100
N_FORKS = 8


class Redis:
    """A client that speaks RESP."""

    def __init__(self, machine):
        self.socket = socket.create_connection(address(machine, REDIS_PORT), timeout=120)
        self.stream = self.socket.makefile("rb")

    def __call__(self, *words):
        parts = [str(word).encode() for word in words]
        self.socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        line = self.stream.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            return None if rest == b"-1" else self.stream.read(int(rest) + 2)[:-2]
        assert kind in (b":", b"+"), line
        return int(rest) if kind == b":" else rest


def install_redis(machine):
    """Debian's redis-check-rdb is the server, too, by another name."""
    program, *libraries = sorted(program_and_libraries("redis-check-rdb"), key=lambda path: "redis" not in path)
    missing = machine.sh(f"for f in {' '.join(libraries)}; do test -e $f || echo $f; done").split()
    for path in [program, *missing]:
        name = "redis-server" if path == program else pathlib.Path(path).name
        transfer("PUT", machine, f"/opt/redis/{name}", pathlib.Path(path).read_bytes())[1].read()
    machine.sh("chmod +x /opt/redis/redis-server")
    options = f"--port {REDIS_PORT} --bind 0.0.0.0 --protected-mode no --save '' --appendonly no"
    machine.exec("sh", "-c", f"LD_LIBRARY_PATH=/opt/redis exec /opt/redis/redis-server {options}",
                 background=True, timeout_ms=None)


@pytest.fixture(scope="module")
def source():
    ports = [{"port": port, "kind": "tcp"} for port in (REDIS_PORT, RANDOM_PORT)]
    machine = torpor.Machine(mem_mib=192, services=ports)
    try:
        install_redis(machine)
        script = (torpor.GUEST_DIR / "randomness.py").read_text()
        machine.exec("sh", "-c", "cat > /workspace/randomness.py", stdin=script)
        machine.exec("python3", "/workspace/randomness.py", str(RANDOM_PORT), background=True, timeout_ms=None)

        def both_answer():
            with contextlib.suppress(OSError, AssertionError, ValueError):
                return Redis(machine)("PING") == b"PONG" and drawn_by_server(machine)
        torpor.wait_for(both_answer, "redis and randomness.py answer")
        yield machine
    finally:
        machine.delete()


def drawn_by_server(machine):
    """By a process that was there before the fork."""
    with socket.create_connection(address(machine, RANDOM_PORT), timeout=120) as connection:
        return json.loads(connection.makefile("rb").read())


class Writer(threading.Thread):
    """A client that counts in redis until it is told to stop."""

    def __init__(self, machine):
        super().__init__()
        self.redis, self.seen, self.stopped = Redis(machine), [], threading.Event()
        self.start()

    def run(self):
        while not self.stopped.is_set():
            self.seen.append(self.redis("INCR", "n"))


def test_eight_forks_of_a_running_redis_have_its_data_and_none_of_its_randomness(source):
    writer = Writer(source)
    torpor.wait_for(lambda: len(writer.seen) > 20, "the client counts")
    before = writer.seen[-1]
    forks = [adopt(info) for info in
             torpor.call("POST", f"/v1/machines/{source.id}/fork", {"count": N_FORKS})["machines"]]
    try:
        after = writer.seen[-1]
        torpor.wait_for(lambda: writer.seen[-1] > after + 20, "the source's client counts on")
        writer.stopped.set()
        writer.join(60)
        assert writer.seen == list(range(1, len(writer.seen) + 1)), "the source's client lost or repeated something"

        drawn = [json.loads(machine.sh("python3 /workspace/randomness.py")) for machine in [source, *forks]]
        for what in drawn[0]:
            assert len({one[what] for one in drawn}) == N_FORKS + 1, (what, drawn)
        drawn = [drawn_by_server(machine) for machine in [source, *forks]]
        # Not client_random: what a library drew before the fork and keeps in memory is part of the memory.
        for what in ("urandom", "kernel_uuid", "uuid4"):
            assert len({one[what] for one in drawn}) == N_FORKS + 1, (what, drawn)
        print("client randoms of a process from before the fork:", {one["client_random"] for one in drawn})

        clients = [Redis(machine) for machine in forks]
        counted = {client("GET", "n") for client in clients}
        assert len(counted) == 1, "the children are of different instants"
        assert before <= int(counted.pop()) <= after + 1
        for number, client in enumerate(clients):
            assert client("SET", "who", number) == b"OK"
        assert [client("GET", "who") for client in clients] == [b"%d" % number for number in range(N_FORKS)]
        assert Redis(source)("GET", "who") is None
    finally:
        writer.stopped.set()
        for machine in forks:
            machine.delete()
