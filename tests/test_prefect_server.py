"""The Prefect API that a run starts where none stands."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import prefect_server
from flows.prefect_server import put_aside_if_damaged, soon_again
from flows.terminal import one_message
from tasks.core.settings import load_settings
from tests.conftest import REPOSITORY

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


@pytest.mark.parametrize(
    ("within_s", "program", "said"),
    [(60, "raise SystemExit(3)", "ended with exit code 3 while it started"), (0, "input()", "did not answer within 0 s")],
)
def test_a_server_that_does_not_start_is_one_message_that_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], within_s: int, program: str, said: str
) -> None:
    monkeypatch.setattr(prefect_server, "API_START_S", within_s)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as server:
        with pytest.raises(SystemExit) as end, one_message(load_settings()):
            prefect_server._wait_until_healthy("http://127.0.0.1:9/api/health", server, tmp_path / "server.log")
        server.kill()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"Error: Prefect's server: {said}. Its log says why: {tmp_path / 'server.log'}.\n"


def database(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as made:
        made.executescript("create table flow (name text); insert into flow values (hex(randomblob(20000)));")
    return path


def torn(content: bytes) -> bytes:
    """Its second half was never written."""
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def misspelt(content: bytes) -> bytes:
    """A bit of a table's own text was lost."""
    return content.replace(b"CREATE TABLE", b"CREATE TABL\xff", 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"?" * 5000, "file is not a database"),
        (lambda content: content[:9000], "malformed"),
        (torn, "overflow list"),
        (misspelt, "not UTF-8"),
    ],
)
def test_a_database_that_cannot_be_read_is_put_aside_with_its_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    path = database(tmp_path / "prefect.db")
    path.write_bytes(damage(path.read_bytes()))
    (tmp_path / "prefect.db-wal").write_bytes(b"")
    was = path.read_bytes()
    assert put_aside_if_damaged(path)
    wal, aside = sorted((left for left in tmp_path.iterdir() if not left.name.endswith("-shm")), key=lambda left: -len(left.name))
    assert aside.name.startswith("prefect.db.damaged-") and wal.name == f"{aside.name}-wal" and aside.read_bytes() == was
    message = capsys.readouterr().err
    assert said in message and str(aside) in message and len(message.splitlines()) == 1


def test_a_database_that_can_be_read_or_is_in_use_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = database(tmp_path / "prefect.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        assert not put_aside_if_damaged(path)
        other.execute("begin exclusive")
        assert not put_aside_if_damaged(path)
    assert not put_aside_if_damaged(tmp_path / "none.db") and list(tmp_path.iterdir()) == [path]
    assert not capsys.readouterr().err


BEGINS = """
from flows.prefect_server import prefect_api
from tasks.core.settings import load_settings, prepare_environment
settings = load_settings()
prepare_environment(settings)
with prefect_api(settings):
    print(load_settings().prefect_api_url)
"""


@pytest.mark.slow
def test_a_run_begins_anew_where_prefects_database_is_damaged(home: Path) -> None:
    path = home / "prefect" / "prefect.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"?" * 5000)
    done = subprocess.run([sys.executable, "-c", BEGINS], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and done.stdout.startswith("http://127.0.0.1:"), done.stdout + done.stderr
    assert "file is not a database" in done.stderr and "a new one is begun" in done.stderr
    with closing(sqlite3.connect(path)) as begun:
        assert begun.execute("pragma quick_check").fetchone() == ("ok",)
