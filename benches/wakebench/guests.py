"""The guests that are measured: what runs inside, and one request to it."""
import dataclasses
import socket

HTTP_PORT, REDIS_PORT = 8080, 6379
HTTP_REQUEST = b"GET /etc/hostname HTTP/1.0\r\n\r\n"
HEAP_SERVER = ("import http.server; heap = bytearray(512 << 20); "
               "heap[::4096] = b'\\x01' * (len(heap) // 4096); "
               "http.server.test(http.server.SimpleHTTPRequestHandler, port=8080)")


@dataclasses.dataclass(frozen=True)
class Guest:
    """A guest's shape, the shell command that starts its server, and the request that is timed."""
    mem_mib: int
    command: str
    port: int
    request: bytes
    answer: bytes
    prepare: str = ""


def file_server(mem_mib):
    return Guest(mem_mib, "exec python3 -m http.server 8080 --directory /", HTTP_PORT, HTTP_REQUEST, b"HTTP/1.0 200")


GUESTS = {
    "http": file_server(256),
    "small": file_server(128),
    "big": file_server(4096),
    "heap": Guest(2048, f'cd / && exec python3 -c "{HEAP_SERVER}"', HTTP_PORT, HTTP_REQUEST, b"HTTP/1.0 200"),
    "redis": Guest(256, "exec redis-server --bind 0.0.0.0 --protected-mode no --save ''", REDIS_PORT,
                   b"PING\r\n", b"+PONG", prepare="command -v redis-server || "
                   "(apt-get update -qq && apt-get install -qq -y --no-install-recommends redis-server)"),
}


def first_byte(address, guest, clock, timeout=120, in_namespace=None):
    """Seconds from before the connect to the first byte of a right answer, and the answer."""
    start = clock()
    with (in_namespace or socket.socket)() as client:
        client.settimeout(timeout)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect(address)
        client.sendall(guest.request)
        answer = client.recv(65536)
        elapsed = clock() - start
        while guest.port == HTTP_PORT and b"\r\n\r\n" not in answer and (more := client.recv(65536)):
            answer += more
    if not answer.startswith(guest.answer):
        raise RuntimeError(f"wrong answer from {address}: {answer[:200]!r}")
    return elapsed, answer
