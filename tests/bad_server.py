"""A server of model files on loopback, well-behaved until it is told to be as bad as real ones are.

    with serving(folder, {"model.ckpt.index": [("status", 503), ("reset", 0.5)]}) as (url, log):
        ...  # the first request for that file gets a 503, the second is cut off halfway, the third is answered

A fault is the name of a method of `Reply`, and its arguments. By hand: `python tests/bad_server.py FOLDER`.
"""

import argparse
import gzip
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

AZURE_ERROR = (  # what OpenAI's storage says of a file that it does not have, byte order mark and all
    '\ufeff<?xml version="1.0" encoding="utf-8"?><Error><Code>BlobNotFound</Code>'
    "<Message>The specified blob does not exist.\nRequestId:0</Message></Error>"
).encode()
HOTEL = b"<!DOCTYPE html><html><head><title>Welcome to Hotel WiFi</title></head><body>Log in</body></html>"


@dataclass
class Request:
    """What was asked, and what became of it: the log's entries."""

    path: str
    range: str | None
    status: int
    sent: int = 0  # bytes of the body, as far as they were handed to the system


class Reply:
    """An answer about to be sent, right at first; most methods are faults, which spoil it.

    The body is a list of `bytes` and of `range`s of the file. `then` is what happens after the share `sends`
    of it: nothing, or "close", "reset", "stall"."""

    def __init__(self, path: str, file: Path, asked: str | None):
        """The file, or the rest of it that `Range: bytes=N-` asks for, or 404, or 416."""
        self.path, self.file, self.sends, self.then, self.chunks = path, file, 1.0, "", False
        self.code, self.headers = 200, {"Content-Type": "application/octet-stream"}
        there = file.is_file() and ".." not in file.parts
        self.size = file.stat().st_size if there else 0
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        self.start = int(match[1]) if match else 0
        self.set_body(range(self.start, self.size))
        if not there:
            self.status(404, AZURE_ERROR, {"Content-Type": "application/xml"})
        elif match and self.start < self.size:
            self.set_content_range(self.start, self.size)
        elif match:
            self.range_refused()

    def set_body(self, *parts: bytes | range) -> None:
        self.parts = list(parts)
        self.headers["Content-Length"] = str(sum(map(len, parts)))

    def set_content_range(self, start: int, total: int) -> None:
        self.code = 206
        self.headers["Content-Range"] = f"bytes {start}-{self.size - 1}/{total}"

    def ends(self, then: str | threading.Event, share: float = 1.0) -> None:
        """After that share of the body reset, stall, close in all order, or wait for an event and go on."""
        self.then, self.sends = then, share

    def shortened(self, share: float) -> None:
        """End early, and with a Content-Length that agrees: only who knows the true size can tell."""
        self.set_body(*cut(self.parts, 0, int(share * sum(map(len, self.parts)))))

    def status(self, code: int, body: bytes = b"no", headers: dict | None = None) -> None:
        """Say something else: an error, an error of the storage or a captive portal's page with status 200."""
        self.code, self.headers = code, dict(headers or {})
        self.set_body(body)

    def redirect(self, url: str = "") -> None:
        """Send to another address; without one to the same, which is a loop if it is done often."""
        self.status(302, b"", {"Location": url or self.path})

    def content_length(self, change: int) -> None:
        """Promise too much or too little, send the whole body, and close."""
        self.headers["Content-Length"] = str(int(self.headers["Content-Length"]) + change)
        self.ends("close")

    def range_ignored(self) -> None:
        """Send the whole file with 200, whatever was asked for."""
        self.code = 200
        self.headers.pop("Content-Range", None)
        self.set_body(range(self.size))

    def range_shifted(self, by: int, admits: bool = True) -> None:
        """Send another part than the one asked for, from `by` bytes before; Content-Range admits it, or not."""
        start = max(self.start - by, 0)
        self.set_body(range(start, self.size if admits else self.size - self.start + start))
        self.set_content_range(start if admits else self.start, self.size)

    def other_total(self, change: int) -> None:
        """Send the right part, of a file that is said to have another size."""
        self.set_content_range(self.start, self.size + change)

    def range_refused(self) -> None:
        """Refuse to send a part; the whole is sent."""
        if self.start:
            self.status(416, headers={"Content-Range": f"bytes */{self.size}"})

    def flipped(self, offset: int) -> None:
        """Send one bit of the file's byte at `offset` wrong, if that byte is sent at all."""
        (part,) = self.parts
        if offset in part:
            byte = bytes([self.file.read_bytes()[offset] ^ 1])
            self.set_body(range(part.start, offset), byte, range(offset + 1, part.stop))

    def gzipped(self) -> None:
        """Compress, although nobody asked."""
        self.set_body(gzip.compress(self.file.read_bytes()[self.start :], 1))
        self.headers["Content-Encoding"] = "gzip"

    def chunked(self, share: float = 1.0) -> None:
        """Send in chunks, without a Content-Length: if it ends early, nothing shows it."""
        self.shortened(share)
        del self.headers["Content-Length"]
        self.headers["Transfer-Encoding"], self.chunks = "chunked", True

    def endless(self) -> None:
        """All that was asked for, without a Content-Length, and then more, and no end."""
        self.chunked()
        self.parts.append(bytes(1000))
        self.then = "stall"

    def without_range(self, share: float) -> None:
        """Range ignored, no Content-Length, ended early: a proxy that does not like large files."""
        self.range_ignored()
        self.chunked(share)


def cut(parts: list, start: int, stop: int) -> list:
    """The bytes of a body from `start` to `stop`."""
    taken = []
    for part in parts:
        taken.append(part[max(start, 0) : max(stop, 0)])
        start, stop = start - len(part), stop - len(part)
    return taken


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a small body waits 40 ms for the acknowledgement of its headers

    def do_GET(self) -> None:
        reply = Reply(
            self.path, self.server.root / self.path.partition("?")[0].lstrip("/"), self.headers["Range"]
        )
        if faults := self.server.faults.get(reply.file.name):
            name, *arguments = faults.pop(0)
            getattr(reply, name)(*arguments)
        request = Request(self.path, self.headers["Range"], reply.code)
        self.server.log.append(request)
        self.send_response(reply.code)
        for name, text in reply.headers.items():
            self.send_header(name, text)
        self.end_headers()
        try:
            self.send_body(reply, request)
        except OSError:  # the client has left
            self.close_connection = True

    def send_body(self, reply: Reply, request: Request) -> None:
        n = sum(map(len, reply.parts))
        stop = int(reply.sends * n)
        self.send_parts(reply, request, cut(reply.parts, 0, stop))
        if isinstance(reply.then, threading.Event):
            reply.then.wait()
            return self.send_parts(reply, request, cut(reply.parts, stop, n))
        if reply.chunks:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = bool(reply.then)
        if reply.then == "stall":
            self.server.closing.wait()
        if reply.then == "reset":
            time.sleep(0.05)  # what was sent shall arrive
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())

    def send_parts(self, reply: Reply, request: Request, parts: list) -> None:
        begun, speed = time.monotonic(), self.server.speed
        step = max(int(speed / 20), 1) if speed else 1 << 20
        for piece in (part[at : at + step] for part in parts for at in range(0, len(part), step)):
            self.wfile.write(b"%x\r\n" % len(piece) if reply.chunks else b"")
            if isinstance(piece, bytes):
                self.wfile.write(piece)
            else:
                with reply.file.open("rb") as file:  # sendfile(2): the server must not be what is measured
                    self.connection.sendfile(file, piece.start, len(piece))
            self.wfile.write(b"\r\n" if reply.chunks else b"")
            request.sent += len(piece)
            if speed:
                time.sleep(max(0.0, begun + request.sent / speed - time.monotonic()))

    def log_message(self, format: str, *args: object) -> None:
        if self.server.verbose:
            super().log_message(format, *args)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path, faults: dict | None = None, speed: float = 0, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.faults, self.speed, self.verbose = Path(root), faults or {}, speed, bool(port)
        self.log: list[Request] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what this server is for."""


@contextmanager
def serving(root: Path, faults: dict[str, list[tuple]] | None = None, *, speed: float = 0):
    """Serve `root/{size}/{file}`: gives the base URL, and the log of requests, which grows.

    `faults` has, by a file's name, a list with one fault for each request, which is used up; `speed` is in
    bytes per second for each connection, 0 for no limit."""
    with Server(root, faults, speed) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server.url, server.log
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def unused_port() -> int:
    """A port of loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a folder of model directories, for trying by hand.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--speed", type=float, default=0, help="bytes per second for each connection")
    given = parser.parse_args()
    with Server(given.folder, None, given.speed, given.port) as server:
        print(f"PICOGPT_BASE_URL={server.url}", flush=True)
        server.serve_forever()
