"""The Prefect API that a run starts where none stands."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from flows.prefect_server import soon_again

pytestmark = pytest.mark.fast


async def busy_at_first(scope: Any, receive: Any, send: Any) -> None:
    """Answers 503 to every first request of an address."""
    assert scope["type"] == "http"
    first = scope["path"] not in seen
    seen.add(scope["path"])
    await send({"type": "http.response.start", "status": 503 if first else 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"busy" if first else b"fine"})


seen: set[str] = set()


@contextmanager
def serving(app: Any) -> Iterator[str]:
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_prefects_client_asks_a_busy_server_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client import base

    waited: list[float] = []
    monkeypatch.setattr(base, "time", SimpleNamespace(sleep=waited.append))  # of this module, not of all

    def ask(app: Any) -> tuple[int, str]:
        seen.clear()
        with serving(app) as address, base.PrefectHttpxSyncClient(base_url=address, enable_csrf_support=False) as client:
            answer = client.get("/task_runs/")
            return answer.status_code, answer.text

    assert ask(soon_again(busy_at_first)) == ask(busy_at_first) == (200, "fine")
    soon, usual = waited
    assert soon < 0.5 < usual


def test_a_server_that_stays_busy_is_waited_for_as_long_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client import base

    async def busy(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": [(b"Retry-After", b"7")]})
        await send({"type": "http.response.body", "body": b""})

    waited: list[float] = []
    monkeypatch.setattr(base, "time", SimpleNamespace(sleep=waited.append))
    with (
        serving(soon_again(busy)) as address,
        base.PrefectHttpxSyncClient(base_url=address, enable_csrf_support=False) as client,
        pytest.raises(Exception, match="503"),
    ):
        client.get("/task_runs/")
    assert waited[0] < 0.5 and len(waited) > 2 and min(waited[1:]) >= 7
