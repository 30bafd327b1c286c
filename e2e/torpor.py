"""A client of the installed torpord for the tests: the unix-socket API, machines, and what tests wait for."""
import contextlib
import http.client
import json
import pathlib
import socket
import subprocess
import time
import urllib.parse

SOCKET = "/run/torpor/api.sock"
STATE_DIR = pathlib.Path("/var/lib/torpor")
EXECUTIONS = pathlib.Path("/run/torpor/exec")
GUEST_DIR = pathlib.Path(__file__).parent / "guest"
SERVICE_PORT = 8080


class ApiFailure(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status, body):
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body
        self.code = body.get("code") if isinstance(body, dict) else None


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("torpor", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def call(method, path, body=None, timeout=240, headers=None):
    """One request to the native API: the JSON answer, or ApiFailure."""
    connection = UnixConnection(SOCKET, timeout)
    try:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        headers = dict({"Content-Type": "application/json"} if data is not None else {}, **(headers or {}))
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    try:
        answer = json.loads(text) if text else None
    except ValueError:
        answer = text.decode(errors="replace")
    if response.status >= 300:
        raise ApiFailure(response.status, answer)
    return answer


def wait_for(predicate, what, timeout=120):
    """Poll until the predicate gives something true; fail naming what did not happen."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = predicate()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"did not happen within {timeout} s: {what}")


class Machine:
    """One machine of a test, deleted at the end."""
    seen_events, next_offset = (), 0

    def __init__(self, **spec):
        self.info = call("POST", "/v1/machines", spec)
        self.id = self.info["id"]

    def get(self):
        return call("GET", f"/v1/machines/{self.id}")

    def status(self):
        return self.get()["status"]

    def pause(self):
        return call("POST", f"/v1/machines/{self.id}/pause")

    def snapshot(self, **body):
        return call("POST", f"/v1/machines/{self.id}/snapshots", body)

    def resume(self, **body):
        return call("POST", f"/v1/machines/{self.id}/resume", body or None)

    def exec(self, *argv, **more):
        body = {"argv": list(argv), "timeout_ms": 120_000, **more}
        return call("POST", f"/v1/machines/{self.id}/exec", body)

    def sh(self, script, **more):
        result = call("POST", f"/v1/machines/{self.id}/exec", {"shell": script, "timeout_ms": 120_000, **more})
        assert result["exit_code"] == 0, result
        return result["stdout"]

    def events(self, kind=None):
        """All of them so far; only what is new since the last call is read."""
        while True:
            page = call("GET", f"/v1/machines/{self.id}/events?limit=1000&after={self.next_offset}")
            self.next_offset = page["next_offset"]
            self.seen_events = (*self.seen_events, *page["events"])
            if len(page["events"]) < 1000:
                return [event for event in self.seen_events if kind in (None, event["kind"])]

    def service(self, port=SERVICE_PORT):
        return next(s for s in self.get()["services"] if s["port"] == port)

    def url(self, path="/", port=SERVICE_PORT):
        return self.service(port)["url"].rstrip("/") + path

    def vmm_pid(self):
        """Process of the VMM that runs it."""
        return vmm_pid(self.get()["execution_id"])

    def start_counter(self, pattern_mib=0, port=SERVICE_PORT):
        """Start guest/counter.py inside and wait until it answers through the proxy."""
        source = (GUEST_DIR / "counter.py").read_text()
        ready = f"/tmp/counter-{port}"
        self.exec("sh", "-c", f"cat > /workspace/counter.py && rm -f {ready} && mkfifo {ready}", stdin=source)
        self.exec("python3", "/workspace/counter.py", str(port), str(pattern_mib), ready, background=True, timeout_ms=None)
        if not any(s["port"] == port for s in self.get()["services"]):
            call("POST", f"/v1/machines/{self.id}/services", {"port": port})
        # Asking for its first answer again and again would take the processor that it starts with.
        try:
            self.sh(f"cat {ready}")
            return fetch(self.url(port=port))
        except (ApiFailure, AssertionError, OSError, http.client.HTTPException) as error:
            raise AssertionError(f"counter.py does not answer: {error}; {self.describe()}") from None

    def describe(self):
        """What is known of a machine that does not do what it should, for the report of a failed test."""
        inside = "ps -ef; ss -tan; cat /proc/net/dev /proc/interrupts; dmesg | tail -n 5"
        try:
            seen = self.exec("sh", "-c", inside, timeout_ms=20_000)["stdout"]
        except (ApiFailure, OSError) as error:
            seen = repr(error)
        console = self.directory / "console.log"
        tail = console.read_text(errors="replace")[-500:] if console.exists() else "none"
        journal = subprocess.run(["journalctl", "-u", "torpord", "-n", "8", "--no-pager", "-o", "cat"],
                                 capture_output=True, text=True, check=False).stdout
        return f"machine {self.get()}\ninside: {seen}\nconsole: {tail}\ntorpord: {journal}"

    def delete(self):
        with contextlib.suppress(ApiFailure):
            call("DELETE", f"/v1/machines/{self.id}")

    @property
    def directory(self):
        return STATE_DIR / "machines" / self.id


def request(url, method="GET", body=None, headers=None, timeout=120):
    """One request of a plain HTTP client: (status, headers, body)."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request(method, parts.path or "/", body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def fetch(url, **more):
    """The JSON of a 200 answer; anything else is an ApiFailure."""
    status, _, text = request(url, **more)
    body = json.loads(text)
    if status != 200:
        raise ApiFailure(status, body)
    return body


def torpord_pid():
    return int(subprocess.check_output(["systemctl", "show", "-p", "MainPID", "--value", "torpord"]))


def wait_for_torpord():
    def healthy():
        with contextlib.suppress(OSError, ApiFailure, http.client.HTTPException):
            return call("GET", "/v1/healthz", timeout=5)
    return wait_for(healthy, "torpord answers", 60)


def kill_torpord():
    """kill -9 torpord and wait until systemd's new one answers."""
    old = torpord_pid()
    subprocess.run(["kill", "-9", str(old)], check=True)
    wait_for(lambda: torpord_pid() not in (0, old), "systemd restarts torpord", 60)
    wait_for_torpord()


def vmm_pid(execution):
    """Process of the VMM that has an execution's directory."""
    return json.loads((EXECUTIONS / execution / "execution.json").read_text())["process"]["pid"]


def disk_bytes(*directories):
    """Bytes that files below directories really take; a file with several names counts once."""
    files = [path.stat() for directory in directories for path in pathlib.Path(directory).rglob("*") if path.is_file()]
    return sum({(file.st_dev, file.st_ino): file.st_blocks * 512 for file in files}.values())
