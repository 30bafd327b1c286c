"""Inside a machine: processes that outlive clients and pauses, files of any size, figures, holds, events, why."""
import base64
import hashlib
import json
import threading

import pytest
import torpor


@pytest.fixture(scope="module")
def machine():
    made = torpor.Machine()
    yield made
    made.delete()


class Stream:
    """An exec over server-sent events."""

    def __init__(self, machine, script, **more):
        self.connection = torpor.UnixConnection(torpor.SOCKET, 120)
        body = json.dumps({"shell": script, **more})
        self.connection.request(
            "POST", f"/v1/machines/{machine.id}/exec/stream", body, {"Content-Type": "application/json"})
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()
        self.pid = self.next()["pid"]

    def next(self):
        while True:
            line = self.response.readline()
            assert line, "the stream ended"
            if line.startswith(b"data: "):
                return json.loads(line[6:])

    def output(self, length):
        text = b""
        while len(text) < length:
            event = self.next()
            assert event["type"] == "stdout", event
            text += base64.b64decode(event["data_base64"])
        return text

    def close(self):
        self.connection.close()


def processes(machine):
    return torpor.call("GET", f"/v1/machines/{machine.id}/processes")["processes"]


def logs(machine, pid):
    return torpor.call("GET", f"/v1/machines/{machine.id}/processes/{pid}/logs")


def transfer(method, machine, path, body=None):
    connection = torpor.UnixConnection(torpor.SOCKET, 240)
    connection.request(method, f"/v1/machines/{machine.id}/files?path={path}", body)
    response = connection.getresponse()
    return connection, response


def test_a_streamed_command_goes_on_after_a_pause_and_no_byte_is_lost(machine):
    stream = Stream(machine, "echo früh; while [ ! -e /tmp/go ]; do sleep 0.1; done; seq 1 20000; exit 7")
    assert stream.output(len("früh\n".encode())) == "früh\n".encode()
    assert machine.pause()["status"] == "paused"
    machine.sh("touch /tmp/go")
    expected = "".join(f"{i}\n" for i in range(1, 20001)).encode()
    assert stream.output(len(expected)) == expected
    assert stream.next() == {"type": "exit", "exit_code": 7, "timed_out": False}
    stream.close()


def test_a_command_that_is_awaited_survives_a_pause(machine):
    answer = {}

    def run():
        answer.update(machine.exec("sh", "-c", "echo a; touch /tmp/on; while [ -e /tmp/on ]; do sleep 0.1; done; echo b"))
    thread = threading.Thread(target=run)
    thread.start()
    torpor.wait_for(lambda: machine.exec("test", "-e", "/tmp/on")["exit_code"] == 0, "the command runs")
    machine.pause()
    machine.sh("rm /tmp/on")
    thread.join(60)
    assert (answer["stdout"], answer["exit_code"]) == ("a\nb\n", 0)


def test_background_processes_keep_logs_codes_and_input_over_a_pause(machine):
    pid = machine.exec("sh", "-c", "echo up; sleep 0.2; echo ü >&2; exit 5", background=True)["pid"]
    torpor.wait_for(lambda: logs(machine, pid).get("exit_code") == 5, "it ends")
    machine.pause()
    kept = logs(machine, pid)
    assert (kept["stdout"], kept["stderr"], kept["exit_code"]) == ("up\n", "ü\n", 5)
    entry = next(p for p in processes(machine) if p["pid"] == pid)
    assert not entry["running"] and entry["argv"][0] == "sh"


def test_a_kill_takes_the_whole_group_and_a_time_out_leaves_the_background_alone(machine):
    pid = machine.exec("sh", "-c", "sleep 1000 & echo $!; sleep 1000", background=True, timeout_ms=100)["pid"]
    child = torpor.wait_for(lambda: logs(machine, pid)["stdout"].strip(), "it says its child's PID")
    with pytest.raises(torpor.ApiFailure) as failure:
        machine.exec("sleep", "1000", timeout_ms=300)
    assert failure.value.code == "exec_timeout"
    assert machine.exec("test", "-d", f"/proc/{child}")["exit_code"] == 0
    torpor.call("POST", f"/v1/machines/{machine.id}/processes/{pid}/kill")
    torpor.wait_for(lambda: machine.exec("test", "-d", f"/proc/{child}")["exit_code"] == 1, "the child is killed")
    with pytest.raises(torpor.ApiFailure) as failure:
        torpor.call("POST", f"/v1/machines/{machine.id}/processes/1/kill")
    assert failure.value.code == "process_not_found"


def test_a_file_of_64_mebibytes_survives_the_round_trip(machine):
    chunk = hashlib.sha512(b"torpor").digest() * 16384
    digest = hashlib.sha256()

    def pieces():
        for _ in range(64):
            digest.update(chunk)
            yield chunk
    connection, response = transfer("PUT", machine, "/workspace/big", pieces())
    entry = json.loads(response.read())
    assert (response.status, entry["size"]) == (200, 64 << 20)
    connection, response = transfer("GET", machine, "/workspace/big")
    back = hashlib.sha256()
    while piece := response.read(1 << 20):
        back.update(piece)
    connection.close()
    assert back.hexdigest() == digest.hexdigest() == machine.sh("sha256sum /workspace/big").split()[0]
    machine.sh("rm /workspace/big")


def test_an_upload_goes_on_after_a_pause_in_its_middle(machine):
    chunk = hashlib.sha512(b"torpor").digest() * 4096
    wakes = machine.get()["wakes"]

    def pieces():
        for number in range(32):
            if number in (8, 24):
                assert machine.pause()["status"] == "paused"
            yield chunk
    response = transfer("PUT", machine, "/workspace/slow", pieces())[1]
    entry = json.loads(response.read())
    assert (response.status, entry.get("size")) == (200, 32 * len(chunk)), entry
    assert machine.sh("sha256sum /workspace/slow").split()[0] == hashlib.sha256(chunk * 32).hexdigest()
    assert machine.get()["wakes"] == wakes + 2
    machine.sh("rm /workspace/slow")


def test_files_are_listed_changed_and_removed(machine):
    def files(operation, **body):
        return torpor.call("POST", f"/v1/machines/{machine.id}/files/{operation}", body)
    transfer("PUT", machine, "/workspace/d/%C3%A4", b"x")[1].read()
    files("mkdir", path="/workspace/d/e/f")
    names = [entry["name"] for entry in files("list", path="/workspace/d", depth=3)["entries"]]
    assert names == ["e", "f", "ä"]
    files("attributes", path="/workspace/d/ä", attributes={"mode": 0o640})
    files("rename", **{"from": "/workspace/d/ä", "to": "/workspace/d/z"})
    stat = files("stat", path="/workspace/d/z")
    assert (stat["mode"], stat["owner"], stat["size"]) == (0o640, "root", 1)
    files("remove", path="/workspace/d", recursive=True)
    with pytest.raises(torpor.ApiFailure) as failure:
        files("stat", path="/workspace/d/z")
    assert (failure.value.status, failure.value.code) == (404, "file_not_found")


def test_figures_and_reasons_are_told_and_wake_nothing(machine):
    metrics = torpor.call("GET", f"/v1/machines/{machine.id}/metrics")
    assert 0 < metrics["mem_used_bytes"] < metrics["mem_total_bytes"] and 0 <= metrics["cpu_percent"] <= 100
    machine.pause()
    why = torpor.call("GET", f"/v1/machines/{machine.id}/why")
    assert (why["status"], why["because"]) == ("paused", "put to sleep by api")
    with pytest.raises(torpor.ApiFailure) as failure:
        torpor.call("GET", f"/v1/machines/{machine.id}/metrics")
    assert (failure.value.status, failure.value.code) == (409, "machine_not_ready")
    assert machine.status() == "paused"
    machine.sh("true")
    why = torpor.call("GET", f"/v1/machines/{machine.id}/why")
    assert why["because"].startswith("woken by api exec")


def test_a_hold_from_inside_keeps_a_sliding_lease_from_ending(machine_factory):
    machine = machine_factory()
    machine.sh("torpor-guest hold 20s a build")
    torpor.call("PUT", f"/v1/machines/{machine.id}/lease",
                {"lease": {"seconds": 2, "action": "pause", "mode": "sliding"}})
    begun = torpor.call("GET", f"/v1/machines/{machine.id}/why")
    assert begun["hold"]["reason"] == "a build"
    slid = torpor.wait_for(
        lambda: begun["lease"]["deadline_unix_ms"] + 3000 < machine.get()["lease"].get("deadline_unix_ms", 0),
        "the hold moves the deadline", 30)
    assert slid
    torpor.wait_for(lambda: machine.status() == "paused", "it falls asleep when the hold is over", 60)


def test_events_are_told_as_they_happen(machine):
    offset = torpor.call("GET", f"/v1/machines/{machine.id}/events?limit=1000")["next_offset"]
    connection = torpor.UnixConnection(torpor.SOCKET, 60)
    connection.request("GET", f"/v1/machines/{machine.id}/events/stream?after={offset}")
    response = connection.getresponse()
    assert response.status == 200
    machine.sh("true")
    machine.pause()
    kinds = []
    while "machine.paused" not in kinds:
        line = response.readline()
        assert line, kinds
        if line.startswith(b"data: "):
            kinds.append(json.loads(line[6:])["kind"])
    connection.close()


def test_the_stream_is_refused_in_the_apis_own_words(machine):
    connection = torpor.UnixConnection(torpor.SOCKET, 30)
    connection.request("GET", f"/v1/machines/{machine.id}/exec/stream")
    response = connection.getresponse()
    body = json.loads(response.read())
    assert (response.status, body["code"]) == (400, "invalid_request")
