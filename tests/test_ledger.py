"""Where the time of a run goes: every moment is charged once, and to who took it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.core import ledger
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.ledger import Account, Ledger
from tests.tiny_stages import AddConfig, CountConfig, add, count

pytestmark = pytest.mark.fast


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run whose time begins now."""
    monkeypatch.setattr(ledger, "_ledger", Ledger(time.monotonic()))
    yield


def total() -> float:
    return sum(ledger.split().values())


def test_what_is_charged_within_is_not_charged_again(begun: None) -> None:
    @ledger.charge("mlflow")
    def log() -> None:
        time.sleep(0.02)

    started, before = time.monotonic(), total()
    with ledger.charge("store"):
        time.sleep(0.01)
        for _ in range(2):
            log()
    spent = ledger.split()
    assert spent["mlflow"] >= 0.04 and spent["store"] >= 0.01
    assert total() - before <= time.monotonic() - started  # all of it together took no longer than the clock says
    assert total() >= spent["mlflow"] + spent["store"]


def test_what_is_done_beside_a_process_that_works_takes_no_time(begun: None) -> None:
    with ledger.charge("processes"):
        with ledger.charge("mlflow"):
            time.sleep(0.03)
        ledger.waited_for({"stages": 0.02})
    spent = ledger.split()
    assert spent["stages"] == 0.02 and spent["mlflow"] == 0 and spent["processes"] >= 0.01
    ledger.waited_for({"stages": 3600.0})  # more than was waited: of an earlier life of the run
    assert ledger.split()["stages"] == 0.02


def test_an_error_ends_a_charge_and_another_thread_is_not_charged(begun: None) -> None:
    with pytest.raises(ValueError), ledger.charge("store"):
        raise ValueError
    stored = ledger.split()["store"]

    def elsewhere() -> None:
        with ledger.charge("store"):
            time.sleep(0.02)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ledger.split()["store"] == stored


def test_without_a_run_nothing_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_ledger", None)
    with ledger.charge("store"):
        pass
    assert total() == 0
    ledger.begin()
    first = ledger.split()["start"]
    assert first > 0  # this process did not begin just now
    ledger.begin()
    assert ledger.split()["start"] < first  # but a second run did


@pytest.mark.slow
def test_a_stage_is_charged_with_its_work_alone(begun: None, home: Path) -> None:
    store = Store((home / "store").as_uri(), home)
    marks: list[dict[Account, float]] = []

    def run(stage: seam.Stage, config: seam.StageConfig, **inputs: seam.Manifest) -> seam.Manifest:
        with ledger.charge("store"):
            manifest, _ = seam.run(stage, config, inputs, store, home / "logs")
        marks.append(ledger.split())
        return manifest

    config = CountConfig(numbers=3, seconds=0.1)
    numbers = run(count, config)
    run(count, config)
    run(add, AddConfig(), numbers=numbers)
    with pytest.raises(StageError):
        run(count, CountConfig(fail="error"))
    made, found, added = marks
    # A process had to start, which takes longer than none; what it did in there took what its function took.
    assert 0.3 <= made["stages"] < numbers.wall_s and made["processes"] > 0 and made["store"] > 0
    assert made["stages"] + made["processes"] <= numbers.wall_s + made["store"]
    assert found["stages"] == made["stages"] and found["processes"] == made["processes"] and found["store"] > made["store"]
    assert added["stages"] > found["stages"] and added["processes"] == found["processes"]  # it needs no process
    assert ledger.split()["stages"] > added["stages"] and ledger.split()["processes"] > added["processes"]  # one that failed worked, too
