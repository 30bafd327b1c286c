"""Requests at any instant: while leases end, machines fall asleep and wake, and torpord is killed or replaced."""
import concurrent.futures
import os
import pathlib
import random
import socket
import subprocess
import threading
import time

import pytest
import torpor
from test_ssh import HOST, PORT

N_ROUNDS = 30
N_CLIENTS = 5


def disturb(machine, ended):
    """Put it to sleep now and then, whoever uses it; its lease does so, too."""
    while not ended.wait(random.uniform(0, 3)):
        try:
            machine.pause()
        except torpor.ApiFailure as overtaken:
            assert overtaken.body["retryable"], overtaken


def test_requests_at_random_instants_meet_no_error_and_every_sleep_ends_in_one_restore(counter):
    before = torpor.fetch(counter.url())
    torpor.call("PUT", f"/v1/machines/{counter.id}/lease", {"lease": {"seconds": 1, "action": "pause"}})
    url, ended, answers = counter.url(), threading.Event(), []

    def request(_):
        time.sleep(random.uniform(0, 0.3))
        return torpor.fetch(url, timeout=120)
    with concurrent.futures.ThreadPoolExecutor(N_CLIENTS + 1) as pool:
        disturbing = pool.submit(disturb, counter, ended)
        try:
            for _ in range(N_ROUNDS):
                # Long enough for a whole pause now and then, and short enough to meet one in its middle.
                time.sleep(random.uniform(0, 3))
                answers += pool.map(request, range(N_CLIENTS))
        finally:
            ended.set()
        disturbing.result()
    counts = sorted(answer["count"] for answer in answers)
    assert counts == list(range(before["count"] + 1, before["count"] + len(answers) + 1)), "lost or repeated"
    assert {answer["nonce"] for answer in answers} == {before["nonce"]}
    n_woken, n_overtaken = n_wakes(counter.events())
    print(f"{len(answers)} requests, {n_woken} wakes, {n_overtaken} pauses overtaken")
    assert n_woken + n_overtaken > 10, "nothing was tried"


def n_wakes(events):
    """Restores, and pauses that a wake overtook; every sleep must end in one of them."""
    seen = {"machine.woken": 0, "machine.pause_cancelled": 0}
    asleep = False
    for event in events:
        kind = event["kind"]
        if kind == "machine.paused":
            assert not asleep, "a sleep without an end"
            asleep = True
        elif kind in seen:
            # A pause may be overtaken before it is committed, and right after.
            assert asleep or kind == "machine.pause_cancelled", "restored twice"
            asleep = False
            seen[kind] += 1
    return tuple(seen.values())


def greeting():
    with socket.create_connection((HOST, PORT), timeout=120) as connection:
        return connection.makefile("rb").readline().startswith(b"SSH-2.0-")


@pytest.mark.parametrize("paused", [False, True])
def test_who_comes_while_there_is_no_torpord_waits_for_the_next(counter, paused):
    before = torpor.fetch(counter.url())["count"]
    url = counter.url()
    if paused:
        counter.pause()
    process = torpor.torpord_pid()
    os.kill(process, 9)
    state = pathlib.Path(f"/proc/{process}/stat")
    torpor.wait_for(lambda: not state.exists() or state.read_text().rsplit(") ", 1)[1][0] == "Z", "it is dead")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        requests = [pool.submit(torpor.fetch, url) for _ in range(8)]
        health = pool.submit(torpor.call, "GET", "/v1/healthz")
        ssh = pool.submit(greeting)
        counts = sorted(request.result()["count"] for request in requests)
        assert counts == list(range(before + 1, before + 9))
        assert health.result() and ssh.result()
    assert torpor.torpord_pid() != process


def test_a_restart_of_torpord_refuses_nobody(counter):
    before = torpor.fetch(counter.url())["count"]
    url, ended = counter.url(), threading.Event()

    def request_on():
        counts = []
        while not ended.is_set():
            counts.append(torpor.fetch(url)["count"])
        return counts
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(request_on) for _ in range(2)]
        try:
            for _ in range(2):
                subprocess.run(["systemctl", "restart", "torpord"], check=True)
        finally:
            ended.set()
        counts = sorted(count for client in clients for count in client.result())
    assert counts == list(range(before + 1, before + len(counts) + 1))
