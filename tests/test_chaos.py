"""Faults at seeded moments, the same command again, and nothing lost: a short version of `make chaos`."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from filelock import FileLock

from tests.chaos.command import REPOSITORY
from tests.chaos.cycle import cycle
from tests.chaos.faults import FAULTS
from tests.chaos.invariants import look, violations
from tests.chaos.pipelines import SMALL, SMOKE
from tests.chaos.world import a_world


def test_faults_on_a_small_pipeline_lose_nothing(tmp_path: Path) -> None:
    """One of every kind that needs neither MLflow's server, which takes long to start, nor a teacher; `make chaos` draws from all."""
    names = [fault.name for fault in FAULTS if not fault.prefect and "MLflow" not in fault.name and "teacher is" not in fault.name]
    with a_world(SMALL, tmp_path) as world:
        for number, name in enumerate(names):
            if world.mounting or name != "the store is read-only":
                found = cycle(world, number, name)
                assert not found.problems, f"{found}\n{found.output}"


def test_what_is_lost_is_found(tmp_path: Path) -> None:
    """The invariants themselves: each of these is done behind the pipeline's back, after it has ended well."""
    with a_world(SMALL, tmp_path) as world:
        said = world.start()
        assert said.wait(SMALL.limit_s)

        def problems(spoil: Callable[[], object]) -> str:
            world.restore()
            before = look(world, 1)
            world.teacher.requests.clear()
            spoil()
            return "; ".join(violations(world, before, said, in_time=True))

        def sql(statement: str) -> Callable[[], object]:
            def run() -> None:
                with sqlite3.connect(world.home / "mlflow.db") as database:
                    database.execute(statement)

            return run

        (total,) = world.store.glob("add/*/total.txt")
        log = world.home / "teacher" / "answers.jsonl"
        assert not problems(lambda: None)
        assert "damaged" in problems(lambda: total.write_text("7"))
        assert "was made again" in problems(lambda: (total.parent / "manifest.json").touch())
        assert "is missing" in problems(lambda: shutil.rmtree(total.parent))
        assert "left RUNNING" in problems(sql("update runs set status = 'RUNNING' where name = 'count'"))
        assert "2 runs of the stage" in problems(
            sql("update tags set value = (select value from tags where key = 'cartwright.key' limit 1) where key = 'cartwright.key'")
        ).replace("4 runs", "2 runs")
        assert "bought 2 times" in problems(lambda: log.write_text(log.read_text() * 2))
        assert "for 0 answers" in problems(lambda: world.teacher.requests.append({}))
        assert "temporary file" in problems(lambda: (world.store / ".partial" / "count-1").mkdir())
        with FileLock(world.home / "locks" / "run-small-0.lock"):
            assert "still held" in problems(lambda: None)


@pytest.mark.slow
def test_a_killed_run_of_the_whole_dag_loses_nothing(tmp_path: Path) -> None:
    with a_world(SMOKE, tmp_path) as world:
        found = cycle(world, 1, "kill the parent")
        assert not found.problems, f"{found}\n{found.output}"


@pytest.mark.fast
def test_a_seed_draws_the_same_fault() -> None:
    code = "from random import Random; from tests.chaos.faults import FAULTS; print(Random(7).choice(FAULTS).name)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    assert said.strip() == Random(7).choice(FAULTS).name
