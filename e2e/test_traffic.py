"""Ways in: who is let in, connections that outlast pauses, and what never wakes a machine."""
import contextlib
import json
import os
import socket
import struct
import subprocess
import urllib.parse

import pytest
import torpor

TCP_PORT = 9000


@pytest.fixture(scope="module")
def server():
    """A running machine with guest/traffic.py; port 8080 open, and 9000 as TCP."""
    machine = torpor.Machine(mem_mib=256, services=[{"port": 8080}, {"port": TCP_PORT, "kind": "tcp"}])
    try:
        source = (torpor.GUEST_DIR / "traffic.py").read_text()
        machine.exec("sh", "-c", "cat > /workspace/traffic.py", stdin=source)
        machine.exec("python3", "/workspace/traffic.py", background=True, timeout_ms=None)

        def answers():
            with contextlib.suppress(OSError):
                return torpor.request(machine.url())[0] == 200
        torpor.wait_for(answers, "traffic.py answers")
        yield machine
    finally:
        machine.delete()


def address(machine, port):
    parts = urllib.parse.urlsplit(machine.service(port)["url"])
    return parts.hostname, parts.port


def n_woken(machine):
    return len(machine.events("machine.woken"))


class WebSocket:
    """A client that speaks RFC 6455 frame by frame, so that a test sees each of them."""

    def __init__(self, machine):
        self.socket = socket.create_connection(address(machine, 8080), timeout=120)
        self.socket.sendall(b"GET /ws HTTP/1.1\r\nHost: guest\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        self.stream = self.socket.makefile("rb")
        assert self.stream.readline().startswith(b"HTTP/1.1 101")
        while self.stream.readline() != b"\r\n":
            pass

    def send(self, opcode, payload):
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))
        self.socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def receive(self):
        head = self.stream.read(2)
        return head[0] & 15, self.stream.read(head[1])

    def says(self, text):
        self.send(1, text.encode())
        opcode, payload = self.receive()
        assert opcode == 1
        return payload.decode()


def test_an_idle_tcp_connection_outlasts_two_pauses(server):
    with socket.create_connection(address(server, TCP_PORT), timeout=120) as connection:
        for number in range(1, 4):
            connection.sendall(b"hello")
            want = f"{number}:hello".encode()
            got = b""
            while len(got) < len(want):
                got += connection.recv(100) or pytest.fail("the connection ended")
            assert got == want, "one process in the guest has counted on"
            if number < 3:
                woken = n_woken(server)
                assert server.pause()["status"] == "paused"
                assert n_woken(server) == woken
    server.pause()
    with socket.create_connection(address(server, TCP_PORT), timeout=120) as connection:
        connection.sendall(b"x" * 100_000)
        got = b""
        while got.count(b"x") < 100_000:
            got += connection.recv(65536) or pytest.fail("the connection ended")


def test_a_websocket_outlasts_two_pauses_and_its_pings_wake_nobody(server):
    client = WebSocket(server)
    pings = int(client.says("a").split()[2])
    client.send(9, b"to the guest")
    assert client.receive() == (10, b"to the guest")
    assert client.says("b") == f"b 2 {pings + 1}"
    server.pause()
    woken = n_woken(server)
    client.send(9, b"to the proxy")
    assert client.receive() == (10, b"to the proxy")
    assert (server.status(), n_woken(server)) == ("paused", woken)
    assert client.says("c") == f"c 3 {pings + 1}", "the same connection of the same process"
    server.pause()
    assert client.says("d") == f"d 4 {pings + 1}"
    server.pause()
    client.send(8, struct.pack("!H", 1000))
    assert client.receive() == (8, struct.pack("!H", 1000))
    assert server.status() == "paused", "a client that goes wakes nobody"


def test_a_signed_url_outlasts_pauses_and_a_bad_token_wakes_nobody(server):
    path = f"/v1/machines/{server.id}/services/8080"
    issued = torpor.call("POST", f"{path}/grants", {"expires_in_seconds": 600})
    torpor.call("PATCH", path, {"auth": "token"})
    try:
        server.pause()
        for url, code in [(server.url(), "edge_token_missing"), (server.url("/?edge_token=x"), "edge_token_invalid")]:
            answer = subprocess.run(["curl", "-s", "-w", "%{http_code}", url], capture_output=True, text=True)
            assert answer.stdout.endswith("401") and json.loads(answer.stdout[:-3])["code"] == code
        assert server.status() == "paused"
        for _ in range(2):
            jar = "/tmp/e2e-traffic.cookies"
            answer = subprocess.check_output(["curl", "-sf", "-c", jar, issued["url"]], text=True)
            assert answer.startswith("/\n") and "tpe1" not in answer
            answer = subprocess.check_output(["curl", "-sf", "-b", jar, server.url("/style.css")], text=True)
            assert answer.startswith("/style.css\n") and "torpor_edge" not in answer
            server.pause()
        used = torpor.call("GET", f"{path}/grants")["grants"][0]
        assert used["http_request_count"] == 4
        torpor.call("DELETE", f"{path}/grants/{issued['grant']['id']}")
        assert subprocess.run(["curl", "-sf", issued["url"]], capture_output=True).returncode == 22
        assert server.status() == "paused"
    finally:
        torpor.call("PATCH", path, {"auth": "none"})


def test_server_sent_events_come_one_by_one(server):
    process = subprocess.Popen(["curl", "-sN", server.url("/sse")], stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    assert first == "data: 0\n"
    assert process.poll() is None, "the first event came before the last"
    assert process.stdout.read().split() == ["data:", "1", "data:", "2"]
