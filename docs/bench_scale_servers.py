"""What bench_scale.py measures of the servers of a team: Prefect with workers that poll, MLflow's records with many runs in them.

The workers are Prefect's own `ProcessWorker`, many in one process: one process each would take 100 MB and their start most of the
processor. They poll, hold their channel open and send heartbeats at the intervals that `make up` and Prefect give them, and never run
anything. Latencies are as a worker sees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from docs.bench_scale_stages import Bench, Samples
from flows.deploying import Server
from tasks.core import settings
from tasks.core.lifetime import tied
from tasks.core.tracking import Tracker, open_parent
from tasks.finetune import finetune
from tasks.synthesize import synthesize

HOST, POOL = "127.0.0.1", "cpu-pool"
START_S = 180
SETTLE_S = 3.0  # after the last worker's first poll: until then they start, and poll at once
CHILDREN = 40  # of a pipeline run: about what `standard` has
ROOT = Path(__file__).resolve().parents[1]


def workers(bench: Bench, size: int, repeat: int) -> Samples:
    """Workers of one pool that wait for work, and meanwhile runs that are written: one a second, for tomorrow, so that nobody takes it.

    Raises:
        RuntimeError: the workers did not poll.
    """
    with prefect_server(bench.places.home) as (environment, process):
        server = Server(environment["PREFECT_API_URL"], {})
        if server.ask(f"work_pools/{POOL}", missing_is_none=True) is None:
            server.ask("work_pools/", {"name": POOL, "type": "process"})
        request = json.dumps({"api": server.api, "pid": process.pid, "size": size, "window_s": bench.scope.window_s})
        # Prefect's client keeps what it first knew of a server, so that each one has a process of its own.
        command = tied("python", "-m", "docs.bench_scale_servers", request)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"The workers failed: {(done.stdout + done.stderr)[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes]]]:
    """A Prefect server as `make up` starts it, and the environment of its clients; ended with all that it started.

    Raises:
        TimeoutError: it does not answer.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    api = f"http://{HOST}:{port}/api"
    (home / "logs").mkdir(parents=True, exist_ok=True)
    environment = {**settings.team_environment(), "PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": api}
    with (home / "logs" / "prefect-server.log").open("ab") as log:
        command = tied("prefect", "server", "start", "--host", HOST, "--port", str(port))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(api):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"The Prefect server does not answer; its log: {home / 'logs' / 'prefect-server.log'}")
            time.sleep(0.2)
        yield environment, process
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)] if process.poll() is None else []
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(family, 10)[1]:
            member.kill()
        process.wait()


def _healthy(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2):
            return True
    except OSError:
        return False


async def polled(server: Server, process: psutil.Process, size: int, window_s: float) -> Samples:
    """What workers, and who writes a run a second, see of a server in so many seconds, and what that takes of the machine.

    Args:
        process: the server's.
    """
    polls: list[float] = []
    writes: list[float] = []
    begun: set[int] = set()
    async with _waiting_workers(size, polls, begun):
        deadline = time.monotonic() + START_S
        while len(begun) < size:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(begun)} of {size} workers polled within {START_S} s")
            await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE_S)
        polls.clear()
        started, cpu = time.perf_counter(), _cpu_s(process)
        flow = (await asyncio.to_thread(server.ask, "flows/", {"name": "scale"}))["id"]
        while (passed := time.perf_counter() - started) < window_s:
            tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
            state = {"type": "SCHEDULED", "state_details": {"scheduled_time": tomorrow}}
            asked = time.perf_counter()
            await asyncio.to_thread(server.ask, "flow_runs/", {"flow_id": flow, "state": state})
            writes.append(1e3 * (time.perf_counter() - asked))
            await asyncio.sleep(max(0.0, 1 - (time.perf_counter() - started - passed)))
        share = (_cpu_s(process) - cpu) / (time.perf_counter() - started)
        memory = sum(member.memory_full_info().pss for member in (process, *process.children(recursive=True))) / 1e6
        found = {"poll_ms": polls[:], "write_ms": writes, "server_cores": [share], "server_mb": [memory]}
    if not found["poll_ms"]:
        raise RuntimeError(f"No worker polled within {window_s:.0f} s")
    return found


@contextlib.asynccontextmanager
async def _waiting_workers(size: int, polls: list[float], begun: set[int]) -> AsyncIterator[None]:
    """Workers that poll; each poll adds its milliseconds to `polls`, and the number of its worker to `begun`."""
    from prefect.workers.process import ProcessWorker

    def timed(number: int, ask: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        async def asked() -> Any:
            started = time.perf_counter()
            found = await ask()
            polls.append(1e3 * (time.perf_counter() - started))
            begun.add(number)
            return found

        return asked

    tasks = []
    for number in range(size):
        worker: Any = ProcessWorker(POOL, name=f"scale-{number}", create_pool_if_not_found=False, limit=1)
        worker._get_scheduled_flow_runs = timed(number, worker._get_scheduled_flow_runs)
        tasks.append(asyncio.create_task(worker.start(printer=lambda said: None)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _cpu_s(process: psutil.Process) -> float:
    return sum(sum(member.cpu_times()[:2]) for member in (process, *process.children(recursive=True)))


def mlflow(bench: Bench, size: int, repeat: int) -> Samples:
    """MLflow runs that are there already, in SQLite: what it costs to write one more, and to begin another pipeline run."""
    data = bench.make(synthesize, bench.tiny.data)
    manifest = bench.make(finetune, bench.tiny.train, base_model=bench.tiny_model(), dataset=data)
    database = bench.places.home / "mlflow-scale.db"
    places = replace(bench.places, mlflow_uri=f"sqlite:///{database}")
    if runs_in(database) > size:
        database.unlink()
    number = 0

    def parent() -> Tracker:
        return open_parent(places, "scale", f"{time.time_ns()}", "scale", {})

    def child(tracker: Tracker) -> None:
        nonlocal number
        number += 1
        tracker.log_stage("finetune", manifest.model_copy(update={"key": f"{time.time_ns():x}-{number}"}), cached=False)

    if not runs_in(database):
        tracker = parent()
        for _ in range(min(CHILDREN, size - 1)):
            child(tracker)
        tracker.end("FINISHED")
    copy_runs(database, size - runs_in(database))
    opened, written = [], []
    for _ in range(3):
        started = time.perf_counter()
        tracker = parent()
        opened.append(1e3 * (time.perf_counter() - started))
        for _ in range(-(-bench.scope.children // 3)):
            started = time.perf_counter()
            child(tracker)
            written.append(1e3 * (time.perf_counter() - started))
        tracker.end("FINISHED")
    return {"child_ms": written, "parent_ms": opened, "database_mb": [database.stat().st_size / 1e6]}


def runs_in(database: Path) -> int:
    """How many runs MLflow's SQLite file has; 0 without one."""
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])
        except sqlite3.OperationalError:  # it was made a moment ago and has no tables yet
            return 0


def copy_runs(database: Path, wanted: int) -> None:
    """Add so many copies of the first pipeline run of MLflow's SQLite file, with its children: through MLflow, thousands take minutes."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {table: [column[1] for column in connection.execute(f"PRAGMA table_info({table})")] for table in tables}
        of_a_run = {table: [name for name in names if name != "run_uuid"] for table, names in columns.items() if "run_uuid" in names}
        (first,) = connection.execute("SELECT run_uuid FROM runs ORDER BY rowid LIMIT 1").fetchone()
        children = connection.execute("SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ?", [first])
        family = [first, *(run for (run,) in children)]
        while wanted > 0:
            copies = {run: uuid.uuid4().hex for run in family[:wanted]}
            for table, names in of_a_run.items():
                listed = ", ".join(f'"{name}"' for name in names)
                copy = f"INSERT INTO {table} (run_uuid, {listed}) SELECT ?, {listed} FROM {table} WHERE run_uuid = ?"
                connection.executemany(copy, [(new, old) for old, new in copies.items()])
            to_new_parent = "UPDATE tags SET value = ? WHERE key = 'mlflow.parentRunId' AND run_uuid = ?"
            connection.executemany(to_new_parent, [(copies[first], new) for new in copies.values()])
            wanted -= len(copies)
        connection.commit()


def main() -> None:
    """`python -m docs.bench_scale_servers REQUEST` prints what `polled` found as JSON: `{"api", "pid", "size", "window_s"}`."""
    request = json.loads(sys.argv[1])
    process = psutil.Process(request["pid"])
    print(json.dumps(asyncio.run(polled(Server(request["api"], {}), process, request["size"], request["window_s"]))))


if __name__ == "__main__":
    main()
