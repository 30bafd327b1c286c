"""The access matrix: every way in, at every state of a machine, with wake switches on and off. Real clients, one machine."""
import asyncio
import json
import random
import subprocess
import threading
import time

import pytest
import torpor
import websockets
from test_ssh import HOST, PORT, keys_of, options
from test_traffic import TCP_PORT, address, server  # noqa: F401 (fixture)

OK = "ok"
DISABLED = "machine_paused_auto_resume_disabled"
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
           "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}


@pytest.fixture(scope="module")
def keys(server, tmp_path_factory):  # noqa: F811
    return keys_of(server, tmp_path_factory)


def curl(machine, path, *more):
    """OK, or the code of the refusal."""
    done = subprocess.run(["curl", "-sS", "--max-time", "120", "-w", "\n%{http_code}", *more, machine.url(path)],
                          capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done
    body, status = done.stdout.rsplit("\n", 1)
    return OK if status == "200" else json.loads(body)["code"]


def http1(machine, _):
    return curl(machine, "/one", "--http1.1")


def http2(machine, _):
    return curl(machine, "/two", "--http2-prior-knowledge")


def server_sent_events(machine, _):
    return curl(machine, "/sse", "-N")


def web_socket(machine, _):
    status, _, body = torpor.request(machine.url("/ws"), headers=UPGRADE) if machine.off else (101, None, None)
    if status != 101:
        return json.loads(body)["code"]

    async def echoed():
        host, port = address(machine, torpor.SERVICE_PORT)
        async with websockets.connect(f"ws://{host}:{port}/ws", open_timeout=120, close_timeout=120) as client:
            await client.send("hello")
            return await asyncio.wait_for(client.recv(), 120)
    assert asyncio.run(echoed()).startswith("hello"), "no echo"
    return OK


def tcp(machine, _):
    host, port = address(machine, TCP_PORT)
    done = subprocess.run(["timeout", "120", "bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}; echo ping >&3; head -c 7 <&3"],
                          capture_output=True, timeout=150)
    return OK if done.stdout == b"1:ping\n" else "closed"


def ssh(machine, keys, *words, program="ssh", port="-p", **more):
    target = f"{machine.id}@{HOST}"
    done = subprocess.run([program, port, str(PORT), *options(keys), *more.pop("extra", []), target, *words],
                          capture_output=True, timeout=150, **more)
    if done.returncode == 255 and b"ermission denied" in done.stderr:
        return b"denied"
    assert done.returncode == 0, done
    return done.stdout


def ssh_exec(machine, keys):
    said = ssh(machine, keys, "echo hello")
    return OK if said == b"hello\n" else said.decode()


def ssh_shell(machine, keys):
    said = ssh(machine, keys, extra=["-tt"], input=b"echo $((6*7)); exit\n")
    return OK if b"42" in said else said.decode()


def sftp(machine, keys):
    said = ssh(machine, keys, program="sftp", port="-P", extra=["-b", "-"], input=b"ls /etc/hostname\n")
    return OK if b"/etc/hostname" in said else said.decode()


def api(work):
    try:
        work()
    except torpor.ApiFailure as refused:
        return refused.code
    return OK


def exec_api(machine, _):
    return api(lambda: machine.sh("true"))


def file_api(machine, _):
    return api(lambda: torpor.call("GET", f"/v1/machines/{machine.id}/files?path=/etc/hostname"))


def connect(machine, _):
    return api(machine.resume)


# Every way in, and what it is told while the machine sleeps and may not be woken.
WAYS = [(http1, DISABLED), (http2, DISABLED), (server_sent_events, DISABLED), (web_socket, DISABLED), (tcp, "closed"),
        (ssh_exec, "denied"), (ssh_shell, "denied"), (sftp, "denied"), (exec_api, DISABLED), (file_api, DISABLED),
        (connect, OK)]


def beside(work):
    """Begin something that may be overtaken, and give it a random start."""
    def run():
        try:
            work()
        except torpor.ApiFailure as overtaken:
            assert overtaken.body["retryable"], overtaken
    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(random.uniform(0, 0.8))
    return thread.join


def running(machine):
    machine.resume()


def pausing(machine):
    machine.resume()
    return beside(machine.pause)


def paused(machine):
    machine.pause()


def waking(machine):
    machine.pause()
    return beside(machine.resume)


def torpord_restarted(machine):
    torpor.kill_torpord()


STATES = [running, pausing, paused, waking, torpord_restarted]


def switch(machine, on):
    machine.off = not on
    torpor.call("PATCH", f"/v1/machines/{machine.id}/wake", dict.fromkeys(["http", "ssh", "tcp", "api"], on))


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("way", [way for way, _ in WAYS], ids=lambda way: way.__name__)
def test_every_way_in_leads_in(server, keys, way, state):  # noqa: F811
    switch(server, True)
    settled = state(server)
    try:
        assert way(server, keys) == OK
    finally:
        if settled:
            settled()


@pytest.mark.parametrize("way, told", WAYS, ids=lambda part: getattr(part, "__name__", None))
def test_a_machine_that_may_not_be_woken_tells_so_and_sleeps_on(server, keys, way, told):  # noqa: F811
    switch(server, True)
    server.pause()
    switch(server, False)
    before = server.get()["wakes"]
    try:
        assert way(server, keys) == told
        if told != OK:
            assert (server.status(), server.get()["wakes"]) == ("paused", before)
            server.resume()
            assert way(server, keys) == OK, "what runs is let in, whatever the switch"
    finally:
        switch(server, True)

