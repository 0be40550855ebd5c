"""Stages forked from a process that has imported torch: as good as in an interpreter of their own, and none is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.core import child, hardware, settings
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.manifests import Manifest
from tasks.domain.errors import UserError
from tests.test_stage import read_until, start
from tests.tiny_stages import CountConfig, count, forked, forked_count

Run = Callable[..., Manifest]


@pytest.fixture
def run(home: Path) -> Run:
    def call(stage: seam.Stage, config: CountConfig, on_event: Callable[[Any], None] = lambda event: None) -> Manifest:
        return seam.run(
            stage, config, {}, Store((home / "store").as_uri(), home), home / "logs", on_event, secrets=lambda: {"SECRET": "s"}
        )[0]

    return call


def server_of(owner: int) -> psutil.Process:
    (found,) = [process for process in psutil.Process(owner).children() if "--fork-server" in process.cmdline()]
    return found


def test_a_stage_begins_with_torch_and_its_own_environment_and_log(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    said = run(forked, CountConfig()).metrics
    assert said["torch"] and said["secret"] == "s" and int(said["trim"]) > 1e9
    assert "MALLOC_TRIM_THRESHOLD_" not in settings.child_environment()  # else a benchmark would count freed memory as used
    (log,) = (home / "logs").glob("forked-*.log")
    assert "said by" in log.read_text()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "12345")
    server = server_of(os.getpid()).pid
    assert run(forked, CountConfig(numbers=4)).metrics["trim"] == "12345"
    assert server_of(os.getpid()).pid == server


def test_with_a_gpu_a_stage_has_an_interpreter_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpu", lambda: "NVIDIA A100")
    said = run(forked, CountConfig()).metrics
    assert not said["torch"] and said["supervisor"] == os.getpid() and int(said["trim"]) > 1e9 and said["secret"] == "s"


def test_events_and_failures_arrive(run: Run) -> None:
    events: list[Any] = []
    assert run(forked_count, CountConfig(), events.append).metrics["numbers"] == 3
    assert [event["done"] for event in events if "done" in event] == [0, 1, 2, 3]
    with pytest.raises(StageError, match="broken on purpose"):
        run(forked_count, CountConfig(fail="error"))
    with pytest.raises(StageError, match="killed by signal 9"):
        run(forked_count, CountConfig(fail="killed"))
    with pytest.raises(UserError, match=r"count.numbers = 3: is unlucky"):
        run(forked_count, CountConfig(fail="user"))
    with pytest.raises(StageError, match="exit code 1") as error:
        run(forked_count, CountConfig(fail="outcome"))
    assert "not JSON serializable" in Path(str(error.value).rsplit("Its log: ", 1)[1]).read_text()


def test_killing_the_owner_kills_server_stage_and_what_it_started(home: Path) -> None:
    process = start(home, "forked_parent", CountConfig())
    pids = read_until(process, lambda event: "metrics" in event)["metrics"]
    stage = psutil.Process(int(pids["pid"]))
    server = server_of(process.pid)
    tree = [server, *server.children(recursive=True)]
    assert {stage.pid, int(pids["grandchild"])} < {found.pid for found in tree} and len(tree) == 4
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(tree, timeout=20)[1]


@pytest.mark.parametrize("victim", ["server", "supervisor"])
def test_after_the_server_was_killed_a_stage_fails_and_the_next_one_does_not(run: Run, victim: str) -> None:
    run(forked, CountConfig())
    server = server_of(os.getpid())
    victims = {"server": lambda: server, "supervisor": lambda: server.children()[0]}

    def kill(event: Any) -> None:
        if event.get("done") == 1:
            victims[victim]().kill()

    with pytest.raises(StageError, match="killed by signal 9"):
        run(forked_count, CountConfig(seconds=0.5), kill)
    assert run(forked_count, CountConfig()).metrics["numbers"] == 3
    assert (server_of(os.getpid()).pid == server.pid) == (victim == "supervisor")


def test_a_server_killed_between_two_stages_is_replaced(run: Run) -> None:
    run(forked, CountConfig())
    server = server_of(os.getpid())
    server.kill()
    psutil.wait_procs([server], timeout=20)
    assert run(forked, CountConfig(numbers=5)).metrics["torch"] and server_of(os.getpid()).pid != server.pid


def test_what_a_stage_computes_is_the_owner_s_and_not_called_others(run: Run) -> None:
    run(forked, CountConfig())
    before = hardware.Disturbance._read()
    run(forked, CountConfig(numbers=7))
    assert hardware.Disturbance._read()[3] - before[3] >= 0.4


def test_a_measurement_has_the_machine_without_the_server(run: Run) -> None:
    run(forked, CountConfig())
    server = server_of(os.getpid())
    run(replace(count, measures=True), CountConfig())
    assert not server.is_running()
    assert run(forked, CountConfig(numbers=6)).metrics["torch"]


def test_a_server_that_cannot_live_is_one_clear_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "FORKS", child.ForkServer())
    monkeypatch.setattr(settings, "child_environment", lambda reuse_memory=False: {"PYTHONHOME": "/nowhere"})
    with pytest.raises(StageError, match="the process from which stages are forked has ended"):
        run(forked, CountConfig())
