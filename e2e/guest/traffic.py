"""Servers for the traffic tests: HTTP with SSE and a WebSocket echo on 8080, a TCP echo on 9000. Standard library only."""
import base64
import hashlib
import http.server
import socketserver
import struct
import threading
import time

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def read_frame(stream):
    head = stream.read(2)
    if len(head) < 2:
        return None, b""
    length = head[1] & 127
    if length == 126:
        length = struct.unpack("!H", stream.read(2))[0]
    mask = stream.read(4) if head[1] & 128 else bytes(4)
    return head[0] & 15, bytes(byte ^ mask[n % 4] for n, byte in enumerate(stream.read(length)))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    pings = 0

    def do_GET(self):
        if self.headers.get("Upgrade", "").lower() == "websocket":
            return self.websocket()
        if self.path.startswith("/sse"):
            return self.sse()
        body = "".join(f"{key}: {value}\n" for key, value in self.headers.items())
        body = f"{self.path}\n{body}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def sse(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(3):
            self.wfile.write(f"data: {number}\n\n".encode())
            self.wfile.flush()
            time.sleep(1)
        self.close_connection = True

    def websocket(self):
        key = self.headers["Sec-WebSocket-Key"].encode()
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest()).decode()
        self.send_response(101)
        for pair in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            self.send_header(*pair)
        self.end_headers()
        count = 0
        while True:
            opcode, payload = read_frame(self.rfile)
            if opcode is None or opcode == 8:
                break
            if opcode == 9:
                Handler.pings += 1
                self.wfile.write(bytes([0x8A, len(payload)]) + payload)
            elif opcode in (1, 2):
                count += 1
                text = payload + f" {count} {Handler.pings}".encode()
                self.wfile.write(bytes([0x81, len(text)]) + text)
        self.close_connection = True

    def log_message(self, *_):
        pass


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        count = 0
        while data := self.request.recv(65536):
            count += 1
            self.request.sendall(f"{count}:".encode() + data)


class Threaded(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True


threading.Thread(target=Threaded(("0.0.0.0", 9000), Echo).serve_forever, daemon=True).start()
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
