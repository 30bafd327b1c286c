"""What must differ between forks, as JSON: of a fresh process (no argument), or of one that serves it on a port for ever."""
import contextlib
import json
import os
import pathlib
import socketserver
import ssl
import sys
import uuid


def client_random():
    """The random of a TLS client's first message: bytes 11 to 43 of its record."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(incoming, outgoing, server_hostname="example.org")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()[11:43].hex()


def drawn():
    kernel = pathlib.Path("/proc/sys/kernel/random/uuid").read_text().strip()
    return {"urandom": os.urandom(16).hex(), "kernel_uuid": kernel, "uuid4": str(uuid.uuid4()),
            "client_random": client_random()}


class Tell(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(json.dumps(drawn()).encode())


if len(sys.argv) > 1:
    drawn()
    socketserver.TCPServer.allow_reuse_address = True
    socketserver.TCPServer(("0.0.0.0", int(sys.argv[1])), Tell).serve_forever()
print(json.dumps(drawn()))
