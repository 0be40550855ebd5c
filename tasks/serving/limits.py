"""What is done with a request before the application sees it: key, rate, size and time of its body; and what is counted after it."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tasks.serving.config import ServeConfig
from tasks.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

ENDPOINTS = ("/intent", "/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")
OPEN = ("/health", "/ready")  # to whoever asks whether the server is well: no key, no rate
CLIENTS = 10_000  # whose rate is remembered
CLOSE = [(b"connection", b"close")]


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        code: what a program can go by.
        parameter: the field it is about.
    """

    def __init__(self, status: int, code: str, message: str, parameter: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter, self.retry_after_s = status, code, parameter, retry_after_s

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API gives it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}

    def headers(self) -> dict[str, str]:
        extra = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return extra | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class Rate:
    """A token bucket for each client: `per_s` requests a second, and twice as many at once."""

    def __init__(self, per_s: float) -> None:
        self._per_s, self._most = per_s, max(1.0, 2 * per_s)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was

    def wait_s(self, client: str, now: float) -> float:
        """Take one request; how long the client has to wait for it, 0 if it need not."""
        if not self._per_s:
            return 0.0
        left, then = self._left.pop(client, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_s)
        self._left[client] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / self._per_s


class Limits:
    """The application behind its limits.

    Args:
        key: what `Authorization: Bearer` has to say; None asks for nothing.
    """

    def __init__(self, application: Application, config: ServeConfig, metrics: Metrics, key: str | None) -> None:
        self._application, self._config, self._metrics = application, config, metrics
        self._key = key and key.encode()
        self._rate = Rate(config.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the start and end of the application."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in ENDPOINTS else "other"
        started, status, begun = time.perf_counter(), 500, False

        async def counted(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
            await send(message)

        try:
            if path not in OPEN:
                self._check(scope)
            body = await self._body(scope, receive)
            leaving = asyncio.ensure_future(_left(receive))
            answer = asyncio.ensure_future(self._application(scope, _replayed(body, leaving), counted))
            try:
                await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() and not begun:  # what nobody waits for any more is not computed
                    raise _Gone
                await answer
            finally:
                answer.cancel()
                leaving.cancel()
                await asyncio.gather(answer, leaving, return_exceptions=True)
        except Refused as refused:
            await _answer(refused, counted)
        except _Gone:
            status = 499  # as nginx counts a client that has left
        finally:
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        client = scope["client"][0] if scope.get("client") else ""
        if wait_s := self._rate.wait_s(client, time.monotonic()):
            message = f"More than {self._config.rate:g} requests a second from {client}"
            raise Refused(429, "rate_limit_exceeded", message, retry_after_s=max(1, round(wait_s)))
        if self._key:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, token = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
                raise Refused(401, "invalid_api_key", "Send the key of this server as `Authorization: Bearer KEY`")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > self._config.max_body:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await self._read(receive)
        except TimeoutError:
            raise Refused(408, "timeout", f"The body did not arrive within {self._config.timeout_s:g} s") from None

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._config.max_body:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> Refused:
        return Refused(413, "body_too_large", f"A body may have {self._config.max_body} bytes")


class _Gone(Exception):
    """The client has left."""


async def _left(receive: Receive) -> None:
    """Wait until the client has left, or has got its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _replayed(body: bytes, leaving: asyncio.Future[None]) -> Receive:
    """A body that was read already, and then what comes after it: the client's leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            await asyncio.shield(leaving)
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(refused: Refused, send: Send) -> None:
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refused.headers().items()]
    headers += CLOSE if refused.status in (408, 413) else []  # what is left of the body is not read
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
