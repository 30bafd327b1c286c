"""A minimal client of torpor-guest's frames, to start the same guest under another VMM."""
import json
import socket
import struct
import time

AGENT_PORT, REQUEST, RESPONSE, ERROR = 1024, 1, 2, 3


def call(vsock_path, request, deadline_s=300):
    """One operation over a `CONNECT <port>` unix socket, tried until the agent is there."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return _call_once(vsock_path, request)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _call_once(vsock_path, request):
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(120)
        channel.connect(vsock_path)
        channel.sendall(f"CONNECT {AGENT_PORT}\n".encode())
        stream = channel.makefile("rb")
        if not stream.readline().startswith(b"OK"):
            raise ConnectionError("the guest agent is not there yet")
        body = json.dumps(request).encode()
        channel.sendall(struct.pack("<BI", REQUEST, len(body)) + body)
        while header := stream.read(5):
            kind, length = struct.unpack("<BI", header)
            payload = stream.read(length)
            if kind == RESPONSE:
                return json.loads(payload)
            if kind == ERROR:
                raise RuntimeError(payload.decode())
        raise ConnectionError("the guest agent closed")
