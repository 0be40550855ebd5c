"""A Prefect API of our own, for a run without a standing server; it starts beside the imports, and dies with the process it is for."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tasks.core import settings as environment
from tasks.core.lifetime import die_with_parent
from tasks.core.settings import Settings

API_START_S = 120
AGAIN_S = b"0.1"  # Prefect's clients take fractions
RARELY_S = 10


@contextmanager
def prefect_api(settings: Settings, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A Prefect API for this process: the one of `PREFECT_API_URL`, else a private one on loopback.

    Prefect's own ephemeral server outlives a parent that is killed; this one is killed with it by the kernel.

    Args:
        check: raises if there is nothing to do with it. Asked while it starts; before, where it has to make its database.
    """
    if settings.prefect_api_url:
        check()
        yield
        return
    if first := not (settings.prefect_home / "prefect.db").exists():
        check()
    settings.prefect_home.mkdir(parents=True, exist_ok=True)
    log = settings.home / "logs" / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.prefect_home / "start.lock"):  # two first starts would race in the migration
        port = free_port()
        with log.open("ab") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "flows.prefect_server", str(os.getpid()), str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **environment.child_environment(),
                    "PREFECT_UI_ENABLED": "false",
                    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",  # who saves one registers its type; takes half a second
                    "PREFECT__SERVER_EPHEMERAL": "1",
                    "PREFECT__SERVER_FINAL": "1",
                },
                start_new_session=True,
            )
        environment.set_prefect_api(f"http://127.0.0.1:{port}/api")
        try:
            if not first:
                check()
            _import_meanwhile()
            _wait_until_healthy(f"http://127.0.0.1:{port}/api/health", server, log)
        except BaseException:
            server.kill()
            environment.set_prefect_api(None)
            raise
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    # Heartbeats tell a standing server that a flow has died; this server dies with it, and every flow would wait for its own to end.
    quiet = temporary_settings(updates={PREFECT_API_URL: f"http://127.0.0.1:{port}/api", PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    try:
        with quiet:
            yield
    finally:
        _send_what_is_queued()
        environment.set_prefect_api(None)
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _send_what_is_queued() -> None:
    """Let Prefect's background threads deliver logs and events while there is still a server to take them."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)


def _import_meanwhile() -> None:
    """What the run imports anyway takes as long as the server needs to start; with two cores the wait costs nothing."""
    gc.disable()  # next to nothing of what an import makes is garbage
    try:
        import flows.retrain  # noqa: F401
        from tasks.core import tracking

        tracking.preload()
    finally:
        gc.freeze()  # nor will it be; the interpreter would look through all of it once more at its end, for a second or more
        gc.enable()


def free_port() -> int:
    """A TCP port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + API_START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"Prefect's server ended with exit code {server.returncode}. Its log: {log}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"Prefect's server did not answer within {API_START_S} s. Its log: {log}")


def _serve(port: int) -> None:
    """Serve Prefect's API in this process. A fifth of its start would go into looking for garbage among what is imported."""
    gc.disable()
    import uvicorn
    from prefect.server.api.server import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.freeze()
            gc.enable()

    Server(uvicorn.Config(soon_again(create_app()), host="127.0.0.1", port=port, log_level="error")).run()


def soon_again(app: Any) -> Any:
    """An ASGI application whose clients ask again soon where its answer is 503.

    So Prefect answers when two transactions of its SQLite database met, which is over at once; clients would wait for two seconds, in
    every third run.
    """

    last = float("-inf")

    async def patient(scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            nonlocal last
            # Once in a while: what stays busy is waited for as long as Prefect's client waits.
            if message["type"] == "http.response.start" and message["status"] == 503 and time.monotonic() - last > RARELY_S:
                last = time.monotonic()
                headers = [header for header in message.get("headers", ()) if header[0].lower() != b"retry-after"]
                message = {**message, "headers": [*headers, (b"retry-after", AGAIN_S)]}
            await send(message)

        await app(scope, receive, send_on)

    return patient


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    _serve(int(sys.argv[2]))
