"""The server process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import json
import logging
import signal
import socket
import struct
import sys
from http import HTTPStatus
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tasks.core.settings import Settings, serve_key
from tasks.domain.errors import UserError
from tasks.serving.app import Service, application
from tasks.serving.champion import Champions
from tasks.serving.config import ServeConfig, check_key
from tasks.serving.limits import Limits, Refused
from tasks.serving.metrics import Metrics

BACKLOG = 1024
LINGER_S = 1.0
SWITCH_S = 0.0005  # the thread that computes and the one that speaks HTTP take turns ten times more often than Python's usual


def serve(settings: Settings, config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; requests that are running then are answered.

    Raises:
        UserError: no key where one is needed, a port in use, or no champion that can be served.
    """
    key = serve_key()
    check_key(config.host, key)
    with _bound(config.host, config.port) as listening:
        _log()
        metrics = Metrics()
        champions = Champions(settings, config, metrics)
        service = Service(config, champions, metrics)
        shown = f"[{config.host}]" if ":" in config.host else config.host
        current = champions.current
        print(
            f"Serving {config.name} version {current.version} ({current.variant}) on http://{shown}:{listening.getsockname()[1]}",
            flush=True,
        )
        sys.setswitchinterval(SWITCH_S)
        gc.freeze()  # what was imported and loaded is not searched for garbage: requests wait for that, and so does the end
        _Server(service, Limits(application(service), config, metrics, key)).serve_on(listening)
        champions.close()


class _Http(H11Protocol):
    """uvicorn's HTTP, with what happens around a request: so many connections, its head in time, answers to what is no HTTP that have the form
    of every other error, and an end for who does not take an answer in time.

    Args:
        limits: `max_connections`, and `timeout_s` for a head, from the connection or from its first byte on, and for what the kernel does
            not take because the client reads nothing.
    """

    def __init__(self, limits: ServeConfig, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._limits = limits
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._over = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` at the first byte that is not sent: closing waits for the last one
        if len(self.connections) > self._limits.max_connections:
            refused = Refused(503, "overloaded", f"There are {self._limits.max_connections} connections", retry_after_s=1)
            self._close_with(refused, linger_s=LINGER_S)
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif not self._head:  # between two requests uvicorn's own timer runs, until the first byte
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._forget_unread()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.timeout_s, self._leave)

    def resume_writing(self) -> None:
        self._forget_unread()
        super().resume_writing()

    def _leave(self) -> None:
        """Without what is not sent yet: the kernel would keep megabytes of it, and offer them for minutes to who does not read."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _forget_unread(self) -> None:
        if self._unread:
            self._unread.cancel()
            self._unread = None

    def _await_head(self) -> None:
        late = Refused(408, "timeout", f"The head of a request did not arrive within {self._limits.timeout_s:g} s")
        self._head = self.loop.call_later(self._limits.timeout_s, self._close_with, late)

    def _forget_head(self) -> None:
        if self._head:
            self._head.cancel()
            self._head = None

    def send_400_response(self, msg: str) -> None:
        self._close_with(Refused(400, "invalid_http", msg))

    def _close_with(self, refused: Refused, linger_s: float = 0.0) -> None:
        """Answer, and close; after a while, if the client may be sending: the kernel resets what is closed with bytes unread, and the
        answer can be lost with it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun, or was given: there is no place for another
            body = json.dumps(refused.body()).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            headers += list(refused.headers().items())
            reason = HTTPStatus(refused.status).phrase.encode()
            for event in (
                h11.Response(status_code=refused.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if linger_s and self.transport.can_write_eof():
            self._over = True
            self.transport.write_eof()
            self._head = self.loop.call_later(linger_s, self.transport.close)
        else:
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn that says so when it ends."""

    def __init__(self, service: Service, application: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                backlog=BACKLOG,
                access_log=False,
                log_config=None,
                http=cast(Any, functools.partial(_Http, service.config)),
                lifespan="off",
                proxy_headers=False,  # a client could call itself whatever it likes, and so have no rate
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(service.config.end_s) or 1,
                ws="none",
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.ending = True
        super().handle_exit(sig, frame)

    def serve_on(self, listening: socket.socket) -> None:
        # uvicorn raises the signals it has caught once more at its end: they have done what they should.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self.run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens on that port, before a model is loaded: who connects meanwhile waits."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError("--host", host, f"is no address of this machine: {error}", mend="127.0.0.1 always is") from None
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            mend = "End the program that listens there, or choose another port; 0 takes a free one"
            raise UserError("--port", port, f"is in use on {host}", mend=mend) from None
        raise UserError(
            "--port" if error.errno == errno.EACCES else "--host", f"{host}:{port}", f"cannot be listened on: {error}"
        ) from None
    return made


def _log() -> None:
    """Ours on stderr, with the time; uvicorn's from warnings on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("cartwright.serve").setLevel(logging.INFO)
