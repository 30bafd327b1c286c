"""`nullspace-sdk` 1.0.3, unmodified: what stays open while a machine sleeps, what is told of it, and the command-line tool."""
import asyncio
import io
import json
import os
import subprocess
from datetime import datetime, timedelta, timezone

import pytest
import sdk
import torpor

sdk.use("nullspace")

from nullspace import AsyncMachine, Lifecycle, Machine  # noqa: E402
from nullspace.client import NullspaceClient  # noqa: E402
from nullspace.errors import AuthError, ConflictError, MachineError  # noqa: E402
from test_sdk_nullspace import awake  # noqa: E402
from websockets.exceptions import InvalidStatus  # noqa: E402
from websockets.sync.client import connect as websocket  # noqa: E402

TRAFFIC = (torpor.GUEST_DIR / "traffic.py").read_text()


@pytest.fixture(scope="module")
def machine():
    machine = Machine.create(template="base", timeout=600, on_timeout="pause", auto_resume=True)
    yield machine
    machine.kill()


def status(machine):
    return Machine.get_info_by_id(machine.id).status.value


def test_a_websocket_wakes_and_outlasts_a_pause(machine):
    now = awake(machine)
    now.files.write("/workspace/traffic.py", TRAFFIC)
    now.commands.run("python3", ["traffic.py"], background=True)
    # A handle that was connected to waits 30 s for any answer.
    torpor.wait_for(lambda: now.wait_for_preview(8080, kind="http", timeout_secs=5).ready, "the server answers")
    url = now.get_websocket_url(8080)
    now.pause()
    with websocket(url, open_timeout=120, ping_interval=None) as client:
        client.send("a")
        assert client.recv(timeout=120).startswith("a 1 ")
        assert status(machine) == "running", "the upgrade woke it"
        awake(machine).pause()
        client.send("b")
        assert client.recv(timeout=120).startswith("b 2 "), "the same connection of the same process"
    with pytest.raises(InvalidStatus) as refused:
        websocket(url.split("?")[0], open_timeout=120)
    assert refused.value.response.status_code == 401


def test_a_websocket_does_not_wake_without_auto_resume():
    machine = Machine.create(template="base", timeout=600, on_timeout="pause")
    try:
        url = machine.get_websocket_url(8080)
        machine.pause()
        with pytest.raises(InvalidStatus) as refused:
            websocket(url, open_timeout=120)
        response = refused.value.response
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert json.loads(response.body)["code"] == "machine_paused_auto_resume_disabled"
        assert status(machine) == "paused"
        for call in (machine.commands.list, lambda: machine.files.read("/etc/hostname")):
            with pytest.raises(ConflictError):
                call()
        with pytest.raises(MachineError) as asleep:
            machine.pty.create_session()
        assert asleep.value.code == "machine_not_ready"
        assert (status(machine), machine.get_metrics()) == ("paused", [])
    finally:
        machine.kill()


def test_a_command_streams_on_and_a_terminal_wakes_at_its_next_key(machine):
    now, pieces = awake(machine), []
    process = now.commands.run("echo 1; read x; echo $x", shell=True, background=True, on_stdout=pieces.append)
    torpor.wait_for(lambda: "".join(pieces) == "1\n", "it begins")
    terminal = now.pty.create_session(cols=100, rows=40)
    now.pause()
    terminal.send_input("tty; stty size; exit 5\n")
    seen = []
    assert terminal.wait(on_data=seen.append, timeout=120).exit_code == 5
    assert b"/dev/pts/" in b"".join(seen) and b"40 100" in b"".join(seen)
    assert status(machine) == "running"
    awake(machine).commands.send_stdin(process.pid, "2\n")
    done = process.wait(timeout=60)
    assert (done.exit_code, done.stdout, "".join(pieces)) == (0, "1\n2\n", "1\n2\n")


def test_a_running_command_is_connected_to(machine):
    now, pieces = awake(machine), []
    process = now.commands.run("echo early; read x; echo late", shell=True, background=True)
    again = now.commands.connect(process.pid, on_stdout=pieces.append)
    now.commands.send_stdin(process.pid, "go\n")
    torpor.wait_for(lambda: "".join(pieces) == "early\nlate\n", "both are heard")
    assert again.pid == process.pid
    shell = now.commands.run("sleep 601 & sleep 602", shell=True, background=True)
    shell.kill()
    sleeps = "grep -sqx sleep /proc/[0-9]*/comm"
    torpor.wait_for(lambda: now.commands.run(sleeps, shell=True).exit_code != 0, "its group went with it")


def test_what_happened_is_found_by_id_time_and_offset(machine):
    now = awake(machine)
    before = now.pause()
    woken = Machine.connect(now.id)
    resumed, paused = woken.list_lifecycle(limit=2).events
    for wanted in ({"source_machine_id": now.id}, {"target_machine_id": woken.id}):
        assert [event.id for event in Lifecycle().list_events(**wanted).events] == [resumed.id], wanted
    assert paused.snapshot_id == before.id
    at = datetime.fromisoformat(str(paused.occurred_at).replace("Z", "+00:00"))
    for zone in (timezone.utc, timezone(timedelta(hours=5, minutes=30)), timezone(-timedelta(hours=8))):
        ends = [(at + timedelta(milliseconds=way)).astimezone(zone).isoformat() for way in (-1, 1)]
        found = woken.list_lifecycle(from_time=ends[0], to_time=ends[1]).events
        assert [event.id for event in found] == [paused.id], zone
    everything = [event.id for event in woken.list_lifecycle(limit=100).events]
    assert [event.id for event in woken.list_lifecycle(limit=2, offset=1).events] == everything[1:3]
    assert next(woken.stream_events(after_event_id=paused.id)).id == resumed.id
    with pytest.raises(MachineError) as no_time:
        woken.list_lifecycle(from_time="yesterday")
    assert no_time.value.code == "invalid_request"


def test_a_timeout_is_two_events_and_the_second_follows_the_first():
    machine = Machine.create(template="base", timeout=1, ephemeral=True)
    events = Lifecycle()
    torpor.wait_for(lambda: len(events.list_machine_events(machine.id).events) == 3, "it is destroyed")
    destroyed, expired, _ = events.list_machine_events(machine.id).events
    assert (expired.operation.value, destroyed.operation.value) == ("timeout_expired", "destroy")
    after = next(events.stream_events(machine_id=machine.id, after_event_id=expired.id))
    assert after.id == destroyed.id


def test_a_machine_says_since_when_it_runs_and_its_pause_since_when_it_sleeps(machine):
    now = awake(machine)
    info = now.get_info()
    assert info.created_at <= info.started_at <= info.expires_at and not info.ephemeral
    from nullspace import Snapshot
    paused = now.pause()
    assert Snapshot.get(paused.id).created_at == paused.created_at
    with pytest.raises(ConflictError):
        Machine.create(snapshot_id=paused.id)
    with Machine.create(template="base", ephemeral=True, memory_mb=256) as short:
        assert short.get_info().ephemeral and short.get_info().metadata == {}


def test_a_wrong_key_opens_no_websocket(machine):
    with pytest.raises(AuthError):
        NullspaceClient(api_key="wrong").ws_connect(f"/v1/machines/{machine.id}/ws", {"channel": "exec"})
    with pytest.raises(AuthError):
        next(Lifecycle(api_key="wrong").stream_events())


def test_the_async_client_streams_types_and_copies(machine):
    async def session():
        now = await AsyncMachine.connect(machine.id)
        pieces = []
        done = await now.commands.run("echo out; exit 3", shell=True, on_stdout=pieces.append)
        assert (done.exit_code, pieces) == (3, ["out\n"])
        process = await now.commands.run("echo behind", shell=True, background=True)
        assert (await process.wait()).stdout == "behind\n"
        terminal = await now.pty.create_session()
        await terminal.send_input("exit 4\n")
        assert (await terminal.wait(timeout=60)).exit_code == 4
        content = os.urandom(9 << 20)
        await now.files.upload_file(io.BytesIO(content), "/workspace/big")
        read = b""
        async for chunk in await now.files.read("/workspace/big", format="stream"):
            read += chunk
        return read == content
    assert asyncio.run(session())


def test_the_command_line_tool_from_create_to_kill(tmp_path):
    from nullspace.cli import main
    made = json.loads(sdk.cli(main, "machine", "create", "--memory", "256", "--on-timeout", "pause", "--auto-resume", "--json"))
    name = made.get("id") or made["data"]["id"]
    try:
        assert "edge_token=" in sdk.cli(main, "machine", "url", name, "8080")
        (tmp_path / "file").write_text("from a file")
        sdk.cli(main, "machine", "upload", name, str(tmp_path / "file"), "/workspace/file")
        assert "from a file" in sdk.cli(main, "machine", "file", "read", name, "/workspace/file")
        sdk.cli(main, "machine", "timeout", "set", name, "--seconds", "300")
        assert f'"machine_id": "{name}"' in sdk.cli(main, "machine", "pause", name)
        assert "paused" in sdk.cli(main, "machine", "get", name)
        key = tmp_path / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        line = sdk.cli(main, "ssh", name, "--identity-file", str(key), "--print-command").strip()
        done = subprocess.run(f"{line} 'echo over ssh'", shell=True, capture_output=True, timeout=120)
        assert done.stdout == b"over ssh\n", done.stderr
        assert "Memory" in sdk.cli(main, "machine", "metrics", name)
        assert "hibernate" in sdk.cli(main, "lifecycle", "events", "--limit", "3")
    finally:
        sdk.cli(main, "machine", "kill", name)
    assert name not in sdk.cli(main, "machine", "list")
