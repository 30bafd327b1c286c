"""SSH with real clients: OpenSSH's ssh and sftp."""
import hashlib
import os
import subprocess

import pytest
import torpor

HOST, PORT = "127.0.0.1", 2222


@pytest.fixture(scope="module")
def machine():
    made = torpor.Machine(name="ssh-e2e")
    yield made
    made.delete()


def keys_of(machine, tmp_path_factory):
    """A directory with the machine's own key and the gateway's host key."""
    directory = tmp_path_factory.mktemp("keys")
    key = torpor.call("GET", f"/v1/machines/{machine.id}/ssh-key")
    (directory / "own").write_text(key["private_key"])
    (directory / "own").chmod(0o600)
    gateway = torpor.call("GET", "/v1/ssh")
    (directory / "known_hosts").write_text(f"[{HOST}]:{PORT} {gateway['host_key']}\n")
    return directory


@pytest.fixture(scope="module")
def keys(machine, tmp_path_factory):
    directory = keys_of(machine, tmp_path_factory)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "mine"], check=True)
    return directory


def options(keys, key="own"):
    words = ["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR"]
    return words + ["-o", f"UserKnownHostsFile={keys}/known_hosts", "-o", f"IdentityFile={keys / key}"]


def ssh(keys, *words, key="own", login="ssh-e2e", **more):
    command = ["ssh", "-p", str(PORT), *options(keys, key), *more.pop("extra", []), f"{login}@{HOST}", *words]
    return subprocess.run(command, capture_output=True, timeout=120, **more)


def test_a_command_gets_input_and_gives_output_and_code(machine, keys):
    done = ssh(keys, "cat; echo err >&2; pwd; exit 7", input=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in\n/root\n", b"err\n")
    big = os.urandom(1 << 20)
    assert ssh(keys, "sha256sum", input=big).stdout.split()[0].decode() == hashlib.sha256(big).hexdigest()
    assert ssh(keys, "head -c 1000000 /dev/zero | tr '\\0' x").stdout == b"x" * 1_000_000


def test_a_shell_has_a_terminal(machine, keys):
    done = ssh(keys, extra=["-tt"], input=b"tty; echo $((6*7)) $TERM; exit 3\n", env={**os.environ, "TERM": "vt100"})
    assert done.returncode == 3, done
    assert b"/dev/pts/" in done.stdout and b"42 vt100" in done.stdout, done.stdout


def test_a_session_outlives_a_pause(machine, keys):
    command = ["ssh", "-p", str(PORT), *options(keys), f"ssh-e2e@{HOST}", "echo pid $$; exec cat"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert client.stdout.readline().startswith(b"pid ")
        for n in range(2):
            machine.pause()
            assert machine.status() == "paused"
            client.stdin.write(b"line %d\n" % n)
            client.stdin.flush()
            assert client.stdout.readline() == b"line %d\n" % n
            assert machine.status() == "running"
        client.stdin.close()
        assert client.wait(60) == 0
    finally:
        client.kill()


def test_ssh_wakes_only_if_it_may(machine, keys):
    machine.pause()
    assert ssh(keys, "echo awake").stdout == b"awake\n"
    torpor.call("PATCH", f"/v1/machines/{machine.id}/wake", {"ssh": False})
    machine.pause()
    refused = ssh(keys, "echo no")
    assert refused.returncode == 255 and b"Permission denied" in refused.stderr, refused
    assert machine.status() == "paused"
    torpor.call("PATCH", f"/v1/machines/{machine.id}/wake", {"ssh": True})
    assert any(event["actor"] == "ssh" for event in machine.events())


def test_only_the_right_keys_enter(machine, keys):
    assert ssh(keys, "true", key="mine").returncode == 255
    assert ssh(keys, "true", login="nobody").returncode == 255
    public = (keys / "mine.pub").read_text()
    registered = torpor.call("POST", "/v1/ssh-keys", {"public_key": public})
    assert ssh(keys, "true", key="mine").returncode == 0
    torpor.call("DELETE", f"/v1/ssh-keys/{registered['id']}")
    assert ssh(keys, "true", key="mine").returncode == 255


def test_a_certificate_enters_its_machine(machine, keys):
    public = (keys / "mine.pub").read_text()
    access = torpor.call("POST", f"/v1/machines/{machine.id}/ssh-access", {"public_key": public})
    (keys / "cert.pub").write_text(access["certificate"])
    extra = ["-o", f"CertificateFile={keys / 'cert.pub'}"]
    done = ssh(keys, "id -un; hostname", key="mine", login=access["user"], extra=extra)
    assert done.stdout.splitlines()[0] == b"root", done


def test_files_go_up_and_down(machine, keys, tmp_path):
    up = tmp_path / "up"
    up.write_bytes(os.urandom(2 << 20))
    up.chmod(0o750)
    batch = f"mkdir d\nput -p {up} d/a\nrename d/a d/b\nln -s b d/l\nls -l d\nget d/l {tmp_path}/down\nrm d/l\nrm d/b\nrmdir d\n"
    command = ["sftp", "-b", "-", "-P", str(PORT), *options(keys), f"ssh-e2e@{HOST}"]
    done = subprocess.run(command, input=batch.encode(), capture_output=True, timeout=120)
    assert done.returncode == 0, done
    assert b"-rwxr-x---" in done.stdout, done.stdout
    assert (tmp_path / "down").read_bytes() == up.read_bytes()


SERVE = "import socket; s = socket.create_server(('127.0.0.1', 7777)); c, _ = s.accept(); c.sendall(c.recv(99).upper())"


def test_a_forward_reaches_the_machines_loopback(machine, keys):
    machine.exec("python3", "-c", SERVE, background=True, timeout_ms=None)
    machine.sh("until grep -q ':1E61 .* 0A ' /proc/net/tcp; do sleep 0.1; done")
    done = ssh(keys, extra=["-W", "127.0.0.1:7777"], input=b"hello")
    assert done.stdout == b"HELLO", done


def test_the_command_line_enters(machine):
    done = subprocess.run(["torpor", "ssh", "ssh-e2e", "--", "echo", "in"], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"in\n"), done
