"""Faults at seeded moments, the same command again, and nothing lost: a short version of `make chaos`."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from filelock import FileLock

from tests.chaos.cycle import cycle
from tests.chaos.faults import FAULTS
from tests.chaos.invariants import Reader, look, violations
from tests.chaos.pipelines import SMALL
from tests.chaos.world import World, a_world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with a_world(SMALL, tmp_path_factory.mktemp("chaos")) as world:
        yield world


def test_faults_on_a_small_pipeline_lose_nothing(small: World) -> None:
    """One of every kind that needs neither MLflow's server, which takes long to start, nor a teacher; `make chaos` draws from all."""
    names = [fault.name for fault in FAULTS if not fault.prefect and "MLflow" not in fault.name and "teacher is" not in fault.name]
    for number, name in enumerate(names):
        if small.mounting or name != "the store is read-only":
            found = cycle(small, number, name)
            assert not found.problems, f"{found}\n{found.output}"


def test_what_is_lost_is_found(small: World) -> None:
    """The invariants themselves: each of these is done behind the pipeline's back, after it has ended well."""
    small.restore()
    said = small.start()
    assert said.wait(SMALL.limit_s)

    def problems(spoil: Callable[[], object]) -> str:
        small.restore()
        before = look(small, 1)
        small.teacher.requests.clear()
        spoil()
        return "; ".join(violations(small, before, said, in_time=True))

    def sql(statement: str) -> Callable[[], object]:
        def run() -> None:
            with closing(sqlite3.connect(small.home / "mlflow.db")) as database, database:
                database.execute(statement)

        return run

    (total,) = small.store.glob("add/*/total.txt")
    log = small.home / "teacher" / "answers.jsonl"
    assert not problems(lambda: None)
    assert "damaged" in problems(lambda: total.write_text("7"))
    assert "was made again" in problems(lambda: (total.parent / "manifest.json").touch())
    assert "is missing" in problems(lambda: shutil.rmtree(total.parent))
    assert "left RUNNING" in problems(sql("update runs set status = 'RUNNING' where name = 'count'"))
    assert "runs of the stage same" in problems(sql("update tags set value = 'same' where key = 'cartwright.key'"))
    assert "bought 2 times" in problems(lambda: log.write_text(log.read_text() * 2))
    assert "for 0 answers" in problems(lambda: small.teacher.requests.append({}))
    assert "temporary file" in problems(lambda: (small.store / ".partial" / "count-1").mkdir())
    lock = FileLock(small.home / "locks" / "run-small-0.lock")
    assert "still held" in problems(lock.acquire)
    lock.release()
    small.restore()
    reader = Reader(small)
    reader.start()
    total.write_text("7")
    deadline = time.monotonic() + 30
    while not reader._seen and time.monotonic() < deadline:
        time.sleep(0.05)
    (seen,) = reader.ended()
    assert f"add {total.parent.name} could be read half-written" in seen
    small.damaged.add(total)
    assert not list(reader.ended())
