"""SSH with clients as they are: scp, and paramiko as the Morph SDK uses it."""
import hashlib
import os
import pathlib
import subprocess
import sys

from test_ssh import HOST, PORT, keys, machine, options  # noqa: F401 (fixtures)


def test_scp_goes_up_and_down(machine, keys, tmp_path):  # noqa: F811
    up = tmp_path / "up"
    up.write_bytes(os.urandom(2 << 20))
    copy = ["scp", "-q", "-P", str(PORT), *options(keys)]
    subprocess.run([*copy, up, f"ssh-e2e@{HOST}:copied"], check=True, timeout=120)
    assert machine.sh("sha256sum /root/copied").split()[0] == hashlib.sha256(up.read_bytes()).hexdigest()
    assert subprocess.run([*copy, f"ssh-e2e@{HOST}:no-such", tmp_path], timeout=120).returncode != 0


PARAMIKO = """
import paramiko, sys, threading
host, port, user, machine = sys.argv[1:]
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
from cryptography.hazmat.primitives.asymmetric import rsa
key = paramiko.RSAKey(key=rsa.generate_private_key(65537, 1024))
client.connect(host, int(port), user, pkey=key, look_for_keys=False, allow_agent=False,
               timeout=5, banner_timeout=5, auth_timeout=5)
client.get_transport().set_keepalive(1)
_, out, _ = client.exec_command("sleep 3; echo done")
assert (out.read(), out.channel.recv_exit_status()) == (b"done\\n", 0)
sftp = client.open_sftp()
data = bytes(range(256)) * 1024
with sftp.open("p", "wb") as file:
    file.write(data)
assert sftp.stat("p").st_size == len(data)
with sftp.open("p") as file:
    assert file.read() == data
sftp.chmod("p", 0o600)
sftp.remove("p")
print("ok")
"""


def test_paramiko_enters_a_paused_machine_with_the_api_key_in_the_user_name(machine):  # noqa: F811
    machine.pause()
    token = pathlib.Path("/etc/torpor/token").read_text().strip()
    command = [sys.executable, "-c", PARAMIKO, HOST, str(PORT), f"{machine.id}:{token}", machine.id]
    done = subprocess.run(command, capture_output=True, timeout=180)
    assert done.stdout == b"ok\n", done
