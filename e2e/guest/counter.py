"""The program that sleeps in the end-to-end tests: state in RAM, on tmpfs and on disk, told over HTTP."""
import http.server
import json
import os
import sys
import threading
import time
import zlib

PATTERN_MIB = int(sys.argv[2]) if len(sys.argv) > 2 else 0
NONCE_PATH, DISK_PATH = "/dev/shm/nonce", "/workspace/disk-nonce"
NONCE = os.urandom(16).hex()
for path in (NONCE_PATH, DISK_PATH):
    with open(path, "w") as file:
        file.write(NONCE)
os.sync()
PATTERN = bytearray(os.urandom(1 << 20) * PATTERN_MIB)
PATTERN[:64] = (b"TORPOR-PATTERN-" + NONCE.encode()).ljust(64)
PATTERN_CRC = zlib.crc32(PATTERN)
LOCK = threading.Lock()
count = 0


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global count
        with LOCK:
            count += 1
            body = {"count": count, "nonce": NONCE, "pid": os.getpid(),
                    "wall": time.time(), "monotonic": time.monotonic()}
        if self.path.startswith("/check"):
            body["tmpfs"] = open(NONCE_PATH).read()
            body["disk"] = open(DISK_PATH).read()
            body["pattern_ok"] = zlib.crc32(PATTERN) == PATTERN_CRC
        self.reply(json.dumps(body).encode())

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(json.dumps({"bytes": len(data), "crc": zlib.crc32(data),
                               "headers": self.headers.items(), "path": self.path}).encode())

    def reply(self, data):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 2048


server = Server(("0.0.0.0", int(sys.argv[1])), Handler)
if len(sys.argv) > 3:
    # A FIFO: whoever started this waits at its other end.
    with open(sys.argv[3], "w") as ready:
        ready.write("\n")
server.serve_forever()
