"""A Prefect API of our own, for a run without a standing server; it starts beside the imports, and dies with the process it is for."""

from __future__ import annotations

import functools
import gc
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tasks.core import settings as environment
from tasks.core.lifetime import die_with_parent
from tasks.core.settings import Settings
from tasks.domain.errors import UserError

API_START_S = 120
AGAIN_S = b"0.1"  # Prefect's clients take fractions
RARELY_S = 10
DAMAGE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class NotStarted(UserError):
    """A server of ours ended, or did not answer, before a run could begin."""

    def __init__(self, problem: str, log: Path) -> None:
        super().__init__("Prefect's server", None, problem, mend=f"Its log says why: {log}")


@contextmanager
def prefect_api(settings: Settings, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A Prefect API for this process: the one of `PREFECT_API_URL`, else a private one on loopback.

    Prefect's own ephemeral server outlives a parent that is killed; this one is killed with it by the kernel.

    Args:
        check: raises if there is nothing to do with it. Asked while it starts; before, where it has to make its database.

    Raises:
        NotStarted: the private one does not start. One that could not read its database begins a new one first.
    """
    if settings.prefect_api_url:
        check()
        yield
        return
    database = settings.prefect_home / "prefect.db"
    if first := not database.exists():
        check()
    settings.prefect_home.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.prefect_home / "start.lock"):  # two first starts would race in the migration
        try:
            server, api = _begin(settings, (lambda: None) if first else check)
        except NotStarted:
            if not put_aside_if_damaged(database):
                raise
            server, api = _begin(settings)
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    # Heartbeats tell a standing server that a flow has died; this server dies with it, and every flow would wait for its own to end.
    quiet = temporary_settings(updates={PREFECT_API_URL: api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
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


def _begin(settings: Settings, check: Callable[[], None] = lambda: None) -> tuple[subprocess.Popen[bytes], str]:
    """A server that answers, and the address of its API, which this process and its children have from now on."""
    log = settings.home / "logs" / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
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
    api = f"http://127.0.0.1:{port}/api"
    environment.set_prefect_api(api)
    try:
        check()
        _import_meanwhile()
        _wait_until_healthy(f"{api}/health", server, log)
    except BaseException:
        server.kill()
        server.wait()
        environment.set_prefect_api(None)
        raise
    return server, api


def put_aside_if_damaged(database: Path) -> bool:
    """Rename a database that SQLite cannot read, and say so; whether there was one.

    It holds Prefect's records of earlier runs and whatever was made in its UI; what is computed and what is not, the store says.
    """
    if not database.exists() or not (damage := _damage(database)):
        return False
    aside = f"{database.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("-wal", "-shm", ""):  # the first two belong to it, and would be taken for the new one's
        if (part := database.with_name(database.name + suffix)).exists():
            part.rename(database.with_name(aside + suffix))
    print(
        f"Prefect's database could not be read ({damage}) and is put aside as {database.with_name(aside)}; a new one is begun. Finished stages "
        "are kept; Prefect's records of earlier runs, deployments and Secret blocks are not in it.",
        file=sys.stderr,
    )
    return True


def _damage(database: Path) -> str:
    """What SQLite finds wrong with a file; nothing where it is whole, or cannot be looked at now."""
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=0)) as connection:
            connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
            broken_rule = found.startswith(("NULL value in", "CHECK constraint"))  # of a table that can be read
            return "" if found == "ok" or broken_rule else found.splitlines()[-1]
    except UnicodeDecodeError:
        return "its schema is not UTF-8"
    except sqlite3.Error as error:
        return str(error) if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE else ""  # the rest of the code is a detail of it


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
            raise NotStarted(f"ended with exit code {server.returncode} while it started", log)
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise NotStarted(f"did not answer within {API_START_S} s", log)


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
