"""`nullspace-sdk` 1.0.3, unmodified, against this host: the vendor's guide as it stands, and what people do beside it."""
import asyncio
import contextlib
import json
import os
import subprocess
import time

import pytest
import sdk
import torpor

sdk.use("nullspace")

from nullspace import AsyncMachine, Lifecycle, Machine, Snapshot  # noqa: E402
from nullspace.errors import AuthError, ConflictError, MachineError, NotFoundError, NotImplementedError  # noqa: E402

COUNTER = (torpor.GUEST_DIR / "counter.py").read_text()


@pytest.fixture(scope="module")
def machine():
    machine = Machine.create(template="base", timeout=600, on_timeout="pause", auto_resume=True,
                             metadata={"suite": "nullspace", "n": 1}, envs={"FROM_CREATE": "yes"})
    yield machine
    machine.kill()


def awake(machine):
    """The shared machine, whatever the test before left of it."""
    now = Machine.connect(machine.id)
    now.set_timeout(600, timeout_action="hibernate")
    return now


def serve_counter(machine, port=8080):
    machine.commands.run("python3", ["-c", "import sys; open('/workspace/counter.py', 'w').write(sys.argv[1])", COUNTER])
    machine.commands.run(f"python3 counter.py {port} 0", shell=True, cwd="/workspace", background=True)
    url = machine.get_url(port)

    def answers():
        with contextlib.suppress(OSError, ValueError, torpor.ApiFailure):
            return fetch(url)
    torpor.wait_for(answers, "counter.py answers")
    return url


def fetch(url):
    head, _, query = url.partition("?")
    status, _, body = request(url) if query else torpor.request(head)
    if status != 200:
        raise torpor.ApiFailure(status, json.loads(body))
    return json.loads(body)


def request(url):
    """torpor.request drops the query, which holds the token here."""
    import http.client
    import urllib.parse
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=120)
    try:
        connection.request("GET", f"{parts.path or '/'}?{parts.query}")
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_the_guide_as_it_stands():
    machine = Machine.create(
        template="base",
        timeout=600,
        on_timeout="pause",
        auto_resume=True,
    )
    try:
        server = machine.commands.run(
            "python3 -m http.server 8080 --bind 0.0.0.0",
            shell=True,
            cwd="/workspace",
            background=True,
        )
        assert server.pid > 1
        url = machine.get_url(8080)
        torpor.wait_for(lambda: request(url)[0] == 200, "the server answers")

        info = Machine.get_info_by_id(machine.id)
        assert (info.status.value, info.snapshot_id) == ("running", None)

        machine.set_timeout(1)
        info = torpor.wait_for(
            lambda: (now := Machine.get_info_by_id(machine.id)).status.value == "paused" and now, "it is paused")
        assert info.snapshot_id and info.id == machine.id
        assert request(url)[0] == 200, "public traffic wakes it"

        original_id = Machine.get_info_by_id(machine.id).id
        snapshot = machine.pause()
        assert snapshot.machine_id == original_id
        resumed = Machine.connect(original_id)
        assert resumed.id not in (original_id, machine.id)
        result = resumed.commands.run("echo resumed", shell=True)
        assert (result.exit_code, result.stdout) == (0, "resumed\n")
        for old in (machine.id, original_id, resumed.id):
            assert Machine.get_info_by_id(old).id == resumed.id
        assert request(url)[0] == 200, "the URL of before still works"
    finally:
        machine.kill()
    with pytest.raises(NotFoundError):
        Machine.get_info_by_id(machine.id)


def test_memory_survives_and_time_stands_still_while_paused(machine):
    now = awake(machine)
    url = serve_counter(now, 8090)
    before = fetch(url)
    now.pause()
    after = fetch(url)
    assert (after["nonce"], after["count"]) == (before["nonce"], before["count"] + 1)


def test_exec_with_and_without_a_shell(machine):
    now = awake(machine)
    done = now.commands.run("echo $FROM_CREATE $X; echo e >&2; exit 4", shell=True, envs={"X": "1"}, cwd="/tmp")
    assert (done.exit_code, done.stdout, done.stderr) == (4, "yes 1\n", "e\n")
    assert now.commands.run("printf", ["%s|", "a b", "$X"]).stdout == "a b|$X|"
    assert now.commands.run("pwd").stdout == "/workspace\n"
    with pytest.raises(MachineError) as slow:
        now.commands.run("sleep 60", shell=True, timeout=1)
    assert slow.value.code == "exec_timeout"
    with pytest.raises(MachineError) as missing:
        now.commands.run("/no/such/program")
    assert missing.value.code == "exec_failed"


def test_without_auto_resume_only_connect_wakes():
    machine = Machine.create(template="base", timeout=600, on_timeout="pause")
    try:
        url = serve_counter(machine)
        machine.hibernate()
        with pytest.raises(ConflictError) as refused:
            machine.commands.run("true")
        assert refused.value.code == "machine_not_ready"
        status, headers, body = request(url)
        assert (status, headers["retry-after"]) == (503, "5")
        answer = json.loads(body)
        assert (answer["code"], answer["retryable"]) == ("machine_paused_auto_resume_disabled", False)
        assert answer["suggested_action"]
        assert Machine.get_info_by_id(machine.id).status.value == "paused"
        assert Machine.connect(machine.id).commands.run("echo", ["up"]).stdout == "up\n"
    finally:
        machine.kill()


def test_a_timeout_with_destroy_ends_the_machine():
    machine = Machine.create(template="base", timeout=3)
    info = machine.get_info()
    assert info.timeout_action.value == "destroy"

    def gone():
        with contextlib.suppress(NotFoundError):
            Machine.get_info_by_id(machine.id)
            return False
        return True
    torpor.wait_for(gone, "the machine is destroyed")
    last = Lifecycle().list_machine_events(machine.id).events[:2]
    assert [event.operation.value for event in last] == ["destroy", "timeout_expired"]


def test_what_cannot_be_is_refused_in_the_sdks_own_classes(machine):
    with pytest.raises(MachineError) as both:
        Machine.create(template="base", auto_resume=True)
    assert both.value.code == "invalid_request"
    with pytest.raises(MachineError) as switch:
        awake(machine).set_timeout(60, timeout_action="destroy")
    assert switch.value.code == "invalid_request"
    with pytest.raises(NotFoundError):
        Machine.get_info_by_id("mch_nope")
    with pytest.raises(NotFoundError):
        Machine.create(template="nope")
    with pytest.raises(AuthError):
        Machine.get_info_by_id(machine.id, api_key="wrong")
    with pytest.raises(NotImplementedError):
        Machine.create(template="base", internet_access=False)


def test_lists_and_leases(machine):
    now = awake(machine)
    lease = now.set_timeout(700)
    assert (lease.timeout_ms, lease.timeout_action.value) == (700_000, "hibernate")
    info = now.get_info()
    assert 600_000 < info.remaining_ms <= 700_000 and info.metadata == {"suite": "nullspace", "n": 1}
    from nullspace.types import MachineQuery
    found = [one.id for one in Machine.list(query=MachineQuery(metadata={"n": 1, "suite": "nullspace"}))]
    assert found == [info.id]
    assert list(Machine.list(state="paused", query=MachineQuery(metadata={"n": 1}))) == []


def test_signed_urls_are_listed_revoked_and_waited_for(machine):
    now = awake(machine)
    serve_counter(now, 8091)
    ready = now.wait_for_preview(8091, kind="http", timeout_secs=60)
    assert (ready.ready, ready.service_ready) == (True, True)
    signed = now.create_signed_preview_url(8091, expires_in_seconds=120)
    assert request(signed.url)[0] == 200
    assert signed.grant.id in [grant.id for grant in now.list_preview_urls(port=8091)]
    assert now.revoke_preview_url(signed.grant.id).success
    status, _, body = request(signed.url)
    assert (status, json.loads(body)["code"]) == (401, "edge_token_invalid")
    assert json.loads(torpor.request(signed.url.split("?")[0])[2])["code"] == "edge_token_missing"
    never = now.wait_for_preview(9999, timeout_secs=1)
    assert (never.ready, never.code) == (False, "preview_service_not_ready")


def test_the_async_client_does_the_same(machine):
    async def session():
        now = await AsyncMachine.connect(machine.id)
        old = now.id
        await now.pause()
        again = await AsyncMachine.connect(old)
        done = await again.commands.run("echo async", shell=True)
        return old != again.id, done.stdout
    assert asyncio.run(session()) == (True, "async\n")


def test_the_command_line_tool(machine):
    from nullspace.cli import main
    now = awake(machine)
    assert "API key accepted" in sdk.cli(main, "doctor")
    assert "from cli" in sdk.cli(main, "machine", "exec", now.id, "echo", "from cli")
    assert now.id in sdk.cli(main, "machine", "get", now.id)


def test_output_comes_as_it_is_written_and_processes_are_listed_fed_and_killed(machine):
    now, pieces = awake(machine), []
    done = now.commands.run("echo out; echo err >&2; exit 5", shell=True, on_stdout=pieces.append, on_stderr=pieces.append)
    assert (done.exit_code, done.stdout, done.stderr, sorted(pieces)) == (5, "out\n", "err\n", ["err\n", "out\n"])
    process = now.commands.run("cat; echo never", shell=True, background=True)
    assert (process.pid, True) in [(one.pid, one.running) for one in now.commands.list()]
    now.commands.send_stdin(process.pid, "fed\n")
    torpor.wait_for(lambda: now.commands.get_logs(process.pid).stdout == "fed\n", "the process answers", timeout=30)
    now.pause()
    now = Machine.connect(now.id)
    now.commands.send_stdin(process.pid, "again\n")
    torpor.wait_for(lambda: now.commands.get_logs(process.pid).stdout == "fed\nagain\n", "it lives on", timeout=30)
    now.commands.kill(process.pid)
    assert now.commands.get_logs(process.pid).stdout == "fed\nagain\n"
    torpor.wait_for(lambda: now.commands.get_logs(process.pid).exit_code == 137, "it was killed", timeout=30)


def test_files_large_and_small_and_directories(machine, tmp_path):
    files = awake(machine).files
    assert files.write("/workspace/f/a.txt", "héllo").size == 6
    assert files.read("/workspace/f/a.txt") == "héllo"
    assert files.read("f/a.txt", format="bytes") == "héllo".encode()
    assert files.exists("/workspace/f/a.txt") and not files.exists("/workspace/f/b.txt")
    files.rename("/workspace/f/a.txt", "/workspace/f/b.txt")
    assert [one.name for one in files.list("/workspace/f")] == ["b.txt"]
    files.remove("/workspace/f")
    with pytest.raises(NotFoundError):
        files.read("/workspace/f/b.txt")
    (tmp_path / "big").write_bytes(os.urandom((9 << 20) + 7))
    files.upload_file(str(tmp_path / "big"), "/workspace/big")
    assert b"".join(files.read("/workspace/big", format="stream")) == (tmp_path / "big").read_bytes()
    (tmp_path / "src/sub").mkdir(parents=True)
    (tmp_path / "src/sub/t").write_text("t")
    files.upload_dir(str(tmp_path / "src"), "/workspace/dst")
    assert files.read("/workspace/dst/sub/t") == "t"


def test_a_terminal_is_one(machine):
    now, seen = awake(machine), []
    session = now.pty.create_session(cols=100, rows=40)
    assert session.session_id in [one.session_id for one in now.pty.list_sessions()]
    session.send_input("stty size; exit 7\n")
    result = session.wait(on_data=seen.append, timeout=60)
    assert (result.exit_code, b"40 100" in b"".join(seen)) == (7, True)


def test_a_terminal_is_found_again_by_its_id(machine):
    now = awake(machine)
    session = now.pty.create_session(envs={"LEFT": "by-the-first"})
    name = session.session_id
    session.disconnect()
    now.pause()
    now = Machine.connect(now.id)
    again, seen = now.pty.connect(session_id=name), []
    now.pty.resize_session(name, cols=90, rows=20)
    assert (now.pty.get_session_info(name).cols, again.pid) == (90, session.pid)
    again.send_input("echo $LEFT; exit 3\n")
    assert again.wait(on_data=seen.append, timeout=60).exit_code == 3
    assert b"by-the-first" in b"".join(seen)
    with pytest.raises(NotFoundError):
        now.pty.kill_session(name)


def test_ssh_with_a_certificate_wakes(machine, tmp_path):
    now = awake(machine)
    access = now.create_ssh_access(expires_in_minutes=10, key_dir=tmp_path)
    assert access.user == "root" and access.certificate.startswith("ssh-ed25519-cert")
    now.pause()
    done = subprocess.run(f"{access.command} 'echo over ssh; exit 3'", shell=True, capture_output=True, timeout=120)
    assert (done.stdout, done.returncode) == (b"over ssh\n", 3), done.stderr
    assert Machine.get_info_by_id(now.id).status.value == "running"


def test_events_come_as_they_happen(machine):
    now, seen = awake(machine), []
    subscription = Lifecycle().subscribe(on_event=seen.append)
    try:
        woken = Machine.connect(now.pause().machine_id)
        torpor.wait_for(lambda: woken.id in [event.target_machine_id for event in seen], "the resume is told")
        operations = [event.operation.value for event in seen if now.id in (event.machine_id, event.source_machine_id)]
        assert operations[-2:] == ["hibernate", "resume_from_snapshot"]
    finally:
        subscription.stop()


def test_a_process_ends_by_itself_is_waited_for_and_may_be_killed_all_the_same(machine):
    process = awake(machine).commands.run("echo out; echo err >&2; exit 6", shell=True, background=True)
    done = process.wait(timeout=60)
    assert (done.exit_code, done.stdout, done.stderr) == (6, "out\n", "err\n")
    process.kill()
    with pytest.raises(NotFoundError):
        machine.commands.kill(4_000_000)


def test_snapshots_forks_and_what_happened(machine):
    now = awake(machine)
    now.commands.run("echo remembered >/dev/shm/note", shell=True)
    snapshot = now.create_snapshot()
    assert snapshot.machine_id == now.id
    assert snapshot.id in [one.id for one in Snapshot.list(machine_id=now.id)]
    child = Machine.create(snapshot_id=snapshot.id, timeout=300)
    fork = now.fork()
    try:
        for one in (child, fork):
            assert one.id != now.id
            assert one.commands.run("cat", ["/dev/shm/note"]).stdout == "remembered\n"
        forked = now.list_lifecycle(operation="fork").events[0]
        assert (forked.source_machine_id, forked.target_machine_id) == (now.id, fork.id)
    finally:
        child.kill()
        fork.kill()
        Snapshot.delete(snapshot.id)
    with pytest.raises(NotFoundError):
        Snapshot.get(snapshot.id)
    paused = now.pause()
    after = Machine.connect(now.id)
    woken = after.list_lifecycle(limit=1).events[0]
    assert (woken.operation.value, woken.status.value) == ("resume_from_snapshot", "succeeded")
    assert (woken.source_machine_id, woken.target_machine_id, woken.snapshot_id) == (now.id, after.id, paused.id)
    for event in after.stream_events(replay_limit=1):
        assert event.id == woken.id
        break
    assert after.get_metrics()[0].mem_total_bytes > 100 << 20


def test_creating_again_with_the_same_key_makes_one_machine(machine):
    import uuid
    import httpx
    key, url = str(uuid.uuid4()), os.environ["NULLSPACE_API_URL"]
    headers = {"Authorization": f"Bearer {os.environ['NULLSPACE_API_KEY']}", "Idempotency-Key": key}
    body = {"template": "base", "vcpus": 1, "memory_mb": 256, "timeout_ms": 60_000, "auto_resume": False}
    ids = {httpx.post(f"{url}/v1/machines", json=body, headers=headers, timeout=120).json()["id"] for _ in range(2)}
    try:
        assert len(ids) == 1
    finally:
        for one in ids:
            Machine.kill_by_id(one)
    started = time.monotonic()
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"} and time.monotonic() - started < 10
