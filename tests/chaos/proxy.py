"""MLflow's address on loopback: what is asked goes on to the real server, unless it is to go wrong."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LATE_S = 1.5
WRONG = {"page": b"<!doctype html><title>Sign in</title>", "nothing": b"{}"}
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Proxy(ThreadingHTTPServer):
    """First goes through a list of faults, then passes everything on.

    Attributes:
        faults: what the next requests meet: `late` (an answer after a while), `500`, `page` (a page instead of an answer, as of a
            gateway that wants a login), `nothing` (an empty object), `drop` (the server never hears of it) or `lost` (the server does
            it, and the answer is lost).
        behind: port of the real server; nobody answers while it is None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.behind: int | None = None
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "late":
            time.sleep(LATE_S)
        self.close_connection = True
        if fault == "500":
            self._answer(500, [], b'{"error_code": "INTERNAL_ERROR", "message": "broken on purpose"}')
        elif fault in WRONG:
            self._answer(200, [("Content-Type", "application/json")], WRONG[fault])
        elif fault != "drop" and self.server.behind:
            try:
                status, headers, content = self._ask(self.server.behind, body)
            except OSError:  # it was killed: the client sees the end of the connection
                return
            if fault != "lost":
                self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def _ask(self, port: int, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        there = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            there.request(self.command, self.path, body, {**dict(self.headers), "Host": f"127.0.0.1:{port}"})
            answer = there.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            there.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """Let a server answer in a thread for as long as the context lasts."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
