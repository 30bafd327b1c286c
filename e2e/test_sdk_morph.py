"""`morphcloud` 0.1.116, unmodified, against this host: the vendor's guide as it stands, and what people do beside it."""
import asyncio
import contextlib
import http.client
import json
import os
import subprocess
import time

import pytest
import sdk
import torpor

sdk.use("morph")

from morphcloud.api import ApiError, MorphCloudClient  # noqa: E402

COUNTER = (torpor.GUEST_DIR / "counter.py").read_text()


@pytest.fixture(scope="module")
def client():
    return MorphCloudClient(api_key=os.getenv("MORPH_API_KEY"))


@pytest.fixture(scope="module")
def snapshot(client):
    """What the guide calls snapshot_your_snapshot_id."""
    return "base"


@pytest.fixture(scope="module")
def instance(client, snapshot):
    instance = client.instances.start(snapshot_id=snapshot, metadata={"suite": "morph"})
    yield instance
    instance.stop()


def awake(instance):
    """The shared instance, whatever the test before left of it."""
    instance.set_ttl(None)
    instance.set_wake_on(wake_on_http=True, wake_on_ssh=True)
    instance.resume()
    assert instance.status.value == "ready"
    return instance


def paused(instance):
    torpor.wait_for(lambda: (instance._refresh(), instance.status == "paused")[1], f"{instance.id} is paused")


def serve_counter(instance, port=8080):
    instance.exec(["python3", "-c", "import sys; open('/workspace/counter.py', 'w').write(sys.argv[1])", COUNTER])
    instance.exec(f"cd /workspace && setsid python3 counter.py {port} 0 >counter.log 2>&1 </dev/null &")
    url = instance.expose_http_service("agent", port)

    def answers():
        with contextlib.suppress(OSError, ValueError, torpor.ApiFailure):
            return torpor.fetch(url)
    torpor.wait_for(answers, "counter.py answers")
    return url


class AutoScalingAgent:
    """The guide's own class, with its two mistakes about the SDK put right: a URL is a str, a status is `ready`."""

    def __init__(self, snapshot_id: str, ttl_minutes: int = 15):
        self.client = MorphCloudClient(api_key=os.getenv("MORPH_API_KEY"))
        self.snapshot_id = snapshot_id
        self.ttl_seconds = ttl_minutes * 60
        self.instance = None

    def start(self):
        self.instance = self.client.instances.start(
            snapshot_id=self.snapshot_id,
            ttl_seconds=self.ttl_seconds,
            ttl_action="pause"
        )
        print(f"Instance started: {self.instance.id}")
        url = self.instance.expose_http_service("agent", 8080)
        print(f"Agent URL: {url}")
        self.instance.set_wake_on(
            wake_on_http=True,
            wake_on_ssh=True
        )
        print("Wake-on-request enabled for HTTP and SSH")
        return url

    def refresh_ttl(self):
        if self.instance:
            self.instance.set_ttl(
                ttl_seconds=self.ttl_seconds,
                ttl_action="pause"
            )


def test_the_guides_agent_scales_to_zero_and_wakes_with_its_memory(client, snapshot):
    agent = AutoScalingAgent(snapshot, ttl_minutes=15)
    url = agent.start()
    try:
        serve_counter(agent.instance)
        before = torpor.fetch(url)
        # Its wake begins another such window, which must not end before the refresh below.
        agent.instance.set_ttl(ttl_seconds=5, ttl_action="pause")
        paused(agent.instance)
        assert client.instances.get(agent.instance.id).status == "paused"
        assert agent.instance.ttl.ttl_expire_at is None
        after = torpor.fetch(url)
        assert (after["nonce"], after["count"]) == (before["nonce"], before["count"] + 1)
        agent.refresh_ttl()
        now = client.instances.get(agent.instance.id)
        assert (now.id, now.status.value) == (agent.instance.id, "ready")
        assert now.ttl.ttl_expire_at > time.time() + 800
    finally:
        agent.instance.stop()
    with pytest.raises(ApiError) as gone:
        client.instances.get(agent.instance.id)
    assert gone.value.status_code == 404


def test_a_ttl_with_stop_deletes(client, snapshot):
    instance = client.instances.start(snapshot_id=snapshot, ttl_seconds=2, ttl_action="stop")

    def gone():
        with contextlib.suppress(ApiError):
            client.instances.get(instance.id)
            return False
        return True
    torpor.wait_for(gone, "the instance is deleted")
    assert instance.id not in [other.id for other in client.instances.list()]


def test_exec_keeps_the_boundaries_of_arguments_and_returns_beside_children(instance):
    awake(instance)
    done = instance.exec("echo out; echo err >&2; exit 3")
    assert (done.exit_code, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert instance.exec(["printf", "%s|", "a b", "c'd", ""]).stdout == "a b|c'd||"
    started = time.monotonic()
    assert instance.exec("sleep 600 >/dev/null 2>&1 </dev/null & echo started").stdout == "started\n"
    assert time.monotonic() - started < 60
    assert "é\u2028x" in instance.exec("printf 'é\\342\\200\\250x'").stdout


def test_a_paused_instance_answers_exec_only_with_wake_on_ssh(instance):
    awake(instance)
    instance.set_wake_on(wake_on_ssh=False)
    assert (instance.wake_on.wake_on_ssh, instance.wake_on.wake_on_http) == (False, True)
    instance.pause()
    assert instance.status.value == "paused"
    instance.pause()
    with pytest.raises(ApiError) as refused:
        instance.exec("true")
    assert (refused.value.status_code, refused.value.error_code) == (409, "instance_paused")
    instance.set_wake_on(wake_on_ssh=True)
    assert instance.exec("echo awake").stdout == "awake\n"


def test_http_without_wake_on_http_says_so_and_leaves_it_paused(instance):
    url = serve_counter(awake(instance))
    instance.set_wake_on(wake_on_http=False)
    instance.pause()
    status, headers, body = torpor.request(url)
    assert (status, headers["retry-after"]) == (503, "5")
    answer = json.loads(body)
    assert (answer["code"], answer["retryable"]) == ("machine_paused_auto_resume_disabled", False)
    instance._refresh()
    assert instance.status.value == "paused"
    instance.set_wake_on(wake_on_http=True)
    assert torpor.fetch(url)["pid"] > 1


def test_services_are_listed_replaced_guarded_and_hidden(instance):
    url = serve_counter(awake(instance))
    assert instance.expose_http_service("agent", 8080) == url
    guarded = instance.expose_http_service("agent", 8080, auth_mode="api_key")
    assert torpor.request(guarded)[0] == 401
    key = {"Authorization": f"Bearer {os.environ['MORPH_API_KEY']}"}
    assert torpor.request(guarded, headers=key)[0] == 200
    instance.hide_http_service("agent")
    assert instance.networking.http_services == []


def test_metadata_and_lists(client, instance):
    instance.set_metadata({"suite": "morph", "k": "v w"})
    assert client.instances.get(instance.id).metadata == {"suite": "morph", "k": "v w"}
    assert [one.id for one in client.instances.list(metadata={"k": "v w"})] == [instance.id]
    assert client.instances.list(metadata={"k": "other"}) == []
    page = client.instances.list_paginated(page=1, limit=1, metadata={"suite": "morph"})
    assert (page.total, page.instances[0].id, page.has_next) == (1, instance.id, False)
    assert "base" in [image.id for image in client.images.list()]


def test_the_async_client_does_the_same(instance):
    awake(instance)

    async def session():
        client = MorphCloudClient(api_key=os.getenv("MORPH_API_KEY"))
        same = await client.instances.aget(instance.id)
        await same.apause()
        assert same.status.value == "paused"
        await same.aresume()
        await same.aset_ttl(ttl_seconds=900, ttl_action="pause")
        done = await same.aexec("echo async")
        pieces = []
        streamed = await same.aexec("echo streamed; exit 4", on_stdout=pieces.append)
        assert (streamed.exit_code, "".join(pieces)) == (4, "streamed\n")
        await same.aset_wake_on(wake_on_http=False)
        assert not same.wake_on.wake_on_http
        return same.status.value, same.ttl.ttl_seconds, done.stdout
    assert asyncio.run(session()) == ("ready", 900, "async\n")


def test_the_command_line_tool(instance):
    from morphcloud.cli import cli
    name = awake(instance).id
    assert name in sdk.cli(cli, "instance", "list")
    assert "a b" in sdk.cli(cli, "instance", "exec", name, "--", "bash", "-c", 'echo "a b"')
    assert "http://" in sdk.cli(cli, "instance", "expose-http", name, "cli", "8085")
    sdk.cli(cli, "instance", "hide-http", name, "cli")
    sdk.cli(cli, "instance", "set-ttl", name, "--ttl-seconds", "600", "--ttl-action", "pause")
    assert instance._api.get(name).ttl.ttl_seconds == 600
    sdk.cli(cli, "instance", "set-ttl", name, "--ttl-seconds", "-1")
    sdk.cli(cli, "instance", "set-wake-on", name, "--ssh", "true", "--http", "false")
    sdk.cli(cli, "instance", "pause", name)
    shown = json.loads(sdk.cli(cli, "instance", "get", name))
    assert (shown["status"], shown["ttl"]["ttl_seconds"], shown["wake_on"]["wake_on_http"]) == ("paused", None, False)
    assert "over ssh" in sdk.cli(cli, "instance", "ssh", name, "echo", "over", "ssh")
    assert "base" in sdk.cli(cli, "image", "list")


def test_output_comes_as_it_is_written(instance):
    pieces = []
    done = awake(instance).exec("echo out; echo err >&2; printf 'é\\342\\200\\250x'; exit 5",
                                on_stdout=pieces.append, on_stderr=pieces.append)
    assert (done.exit_code, done.stdout, done.stderr) == (5, "out\né\u2028x", "err\n")
    assert "err\n" in pieces


def test_snapshots_are_found_by_digest_and_branches_go_on_with_the_memory(client, instance):
    awake(instance).exec("echo remembered >/dev/shm/note")
    snapshot = instance.snapshot(digest="suite-digest", metadata={"k": "v"})
    try:
        assert instance.snapshot(digest="suite-digest").id == snapshot.id
        assert [one.id for one in client.snapshots.list(digest="suite-digest", metadata={"k": "v"})] == [snapshot.id]
        child = client.instances.start(snapshot.id)
        assert child.refs.snapshot_id == snapshot.id
        assert child.exec("cat /dev/shm/note").stdout == "remembered\n"
        child.stop()
        snapshot.set_metadata({"z": "1"})
        snapshot.set_ttl(3600)
        assert (snapshot.metadata, snapshot.ttl.ttl_seconds) == ({"z": "1"}, 3600)
    finally:
        snapshot.delete()
    base, branches = instance.branch(3)
    try:
        assert len({one.id for one in branches} | {instance.id}) == 4
        assert [one.exec("cat /dev/shm/note").stdout for one in branches] == ["remembered\n"] * 3
    finally:
        for one in branches:
            one.stop()
        base.delete()


def test_a_chain_of_commands_is_made_once_and_found_again(client, instance):
    base = awake(instance).snapshot()
    made = [base]
    try:
        made.append(base.exec("echo one >/workspace/chain"))
        assert base.exec("echo one >/workspace/chain").id == made[1].id, "the same step is not run again"
        made.append(made[1].exec("echo two >>/workspace/chain"))
        assert made[2].digest == base.compute_chain_hash(
            made[1].digest, "_run_command_effect()" + str({"command": "echo two >>/workspace/chain",
                                                           "background": False, "get_pty": True}))
        with pytest.raises(RuntimeError, match="exit code 3"):
            made[2].exec("exit 3")
        with client.instances.start(made[2].id) as last:
            assert last.exec("cat /workspace/chain").stdout == "one\ntwo\n"
        assert instance.exec("ls /workspace/chain").exit_code == 2, "the steps were done to others"
    finally:
        for snapshot in made:
            snapshot.delete()


def test_a_reboot_grows_the_disk_and_keeps_what_is_on_it(instance):
    awake(instance).exec("echo kept >/workspace/kept; sync")
    large = instance.spec.disk_size * 2
    instance.reboot(disk_size=large)
    assert (instance.status.value, instance.spec.disk_size) == ("ready", large)
    assert instance.exec("cat /workspace/kept").stdout == "kept\n"

    def size_mib():
        blocks, block_bytes = map(int, instance.exec("stat -f -c '%b %S' /").stdout.split())
        return blocks * block_bytes >> 20
    torpor.wait_for(lambda: size_mib() > large * 3 // 4, "the file system has grown beside the boot")


def test_a_program_that_is_not_there_is_an_exit_code(instance):
    done = awake(instance).exec(["no-such-program", "x"])
    assert (done.exit_code, "no-such-program" in done.stderr) == (127, True)


def test_a_counter_does_not_advance_while_it_is_paused(instance):
    tick_s, paused_s = 0.1, 8
    awake(instance).exec(f"setsid sh -c 'n=0; while :; do n=$((n+1)); echo $n >/dev/shm/n; sleep {tick_s}; done' "
                         "</dev/null >/dev/null 2>&1 &")

    def count():
        return int(torpor.wait_for(lambda: instance.exec("cat /dev/shm/n 2>/dev/null").stdout.strip(), "it counts"))
    began, first = time.monotonic(), count()
    instance.pause()
    time.sleep(paused_s)
    instance.resume()
    second = torpor.wait_for(lambda: (now := count()) > first and now, "it counts on")
    awake_s = time.monotonic() - began - paused_s
    assert second <= first + awake_s / tick_s + 1, "it went on from where it was"


def test_the_ssh_gateway_wakes_for_a_handle_that_does_not_know_of_the_pause(instance, monkeypatch):
    client = MorphCloudClient(api_key=os.getenv("MORPH_API_KEY"))
    stale = client.instances.get(awake(instance).id)
    instance.pause()
    assert stale.status.value == "ready"
    with stale.ssh() as ssh:
        assert ssh.run("echo woken", get_pty=False).stdout == "woken\n"
    assert client.instances.get(instance.id).status.value == "ready"
    monkeypatch.setenv("MORPH_SSH_TOTAL_TIMEOUT_SECS", "1")
    stranger = client.instances.get(instance.id)
    stranger._api = MorphCloudClient(api_key="wrong").instances
    with pytest.raises(TimeoutError):
        stranger.ssh()
    instance.set_wake_on(wake_on_ssh=False)
    instance.pause()
    with pytest.raises(TimeoutError):
        stale.ssh()
    assert client.instances.get(instance.id).status.value == "paused"


def screen(channel, wanted):
    """What a terminal has shown once it has shown this."""
    seen = b""
    channel.settimeout(60)
    while wanted not in seen:
        seen += channel.recv(4096) or pytest.fail(f"{wanted} never came: {seen}")
    return seen


def test_ssh_has_terminals_forwards_and_directories(instance, tmp_path):
    with awake(instance).ssh() as ssh:
        shell = ssh._client.invoke_shell(term="xterm", width=100, height=30)
        shell.send(b"stty size\n")
        screen(shell, b"30 100")
        shell.resize_pty(width=90, height=25)
        shell.send(b"stty size; exit 6\n")
        screen(shell, b"25 90")
        assert shell.recv_exit_status() == 6
        ssh.write_file("/workspace/w", "written", mode=0o600)
        assert ssh.read_file("/workspace/w") == "written"
        process = ssh.run("echo begun; sleep 1; echo over", background=True, get_pty=False)
        torpor.wait_for(lambda: process.completed and "over" in process.stdout, "it runs beside others")
        process.stop()
        instance.exec("setsid python3 -m http.server 8099 --bind 127.0.0.1 --directory /workspace "
                      "</dev/null >/tmp/served 2>&1 & until grep -q ':1FA3 .* 0A ' /proc/net/tcp; do sleep 0.2; done")
        with ssh.tunnel(18099, 8099):
            def forwarded():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return torpor.request("http://127.0.0.1:18099/w")[2]
            assert torpor.wait_for(forwarded, "the forward answers") == b"written"
    (tmp_path / "up/sub").mkdir(parents=True)
    (tmp_path / "up/sub/file").write_text("in a directory")
    instance.upload(str(tmp_path / "up"), "/workspace/tree", recursive=True)
    instance.download("/workspace/tree", str(tmp_path / "down"), recursive=True)
    assert (tmp_path / "down/sub/file").read_text() == "in a directory"


def test_the_instances_own_key_opens_plain_ssh_until_it_is_rotated(instance, tmp_path):
    key, path = awake(instance).ssh_key(), tmp_path / "key"
    path.write_text(key.private_key)
    path.chmod(0o600)
    line = ["ssh", "-i", str(path), "-p", os.environ["MORPH_SSH_PORT"], "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            f"{instance.id}@{os.environ['MORPH_SSH_HOSTNAME']}", "echo plain; exit 3"]
    done = subprocess.run(line, capture_output=True, timeout=120)
    assert (done.stdout, done.returncode) == (b"plain\n", 3), done.stderr
    assert instance.ssh_key_rotate().public_key != key.public_key
    assert subprocess.run(line, capture_output=True, timeout=120).returncode == 255


def test_ssh_wakes_runs_and_copies(instance, tmp_path):
    awake(instance).pause()
    with instance.ssh() as ssh:
        assert ssh.run(["echo", "over ssh"]).stdout.strip() == "over ssh"
    assert instance.status.value == "ready"
    (tmp_path / "up").write_bytes(os.urandom(100_000))
    instance.upload(str(tmp_path / "up"), "/workspace/up")
    instance.download("/workspace/up", str(tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() == (tmp_path / "up").read_bytes()


def test_wrong_keys_and_unknown_ids_raise_what_the_sdk_knows():
    with pytest.raises(ApiError) as wrong:
        MorphCloudClient(api_key="wrong").instances.list()
    assert wrong.value.status_code == 401
    client = MorphCloudClient(api_key=os.getenv("MORPH_API_KEY"))
    for call in (lambda: client.instances.get("morphvm_nope"), lambda: client.instances.start("snapshot_nope")):
        with pytest.raises(ApiError) as missing:
            call()
        assert missing.value.status_code == 404 and missing.value.detail
