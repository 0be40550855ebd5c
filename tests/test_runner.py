"""What a run notes of its stages, and what a person is told of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flows.cli import _say_where
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.display import Display
from tasks.core.runner import Runner
from tasks.core.settings import load_settings
from tests.tiny_stages import CountConfig, count

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.core.runner.as_prefect_task", lambda label, body: body()[0])


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def runner(home: Path, written: io.StringIO) -> Runner:
    tracker: Any = SimpleNamespace(
        child=lambda *_: "c",
        log=lambda *_, **__: None,
        log_stage=lambda *_, **__: None,
        client=SimpleNamespace(set_terminated=lambda *_: None),
    )
    return Runner("r", load_settings(), Store((home / "store").as_uri(), home), tracker, Display(Console(file=written, width=200)))


def test_a_stage_that_fails_is_noted_where_it_belongs(runner: Runner, written: io.StringIO) -> None:
    for fail in ("", "error", ""):
        try:
            runner._run(count, CountConfig(fail=fail), f"count {fail}", {})
        except StageError:
            assert fail
    assert [stage["state"] for stage in runner.stages] == ["computed", "failed", "cached"]
    assert runner.stages[1] | {"name": "count error", "kind": "count", "key": "", "pool": "local"} == runner.stages[1]
    assert any(line.startswith("failed count error") and "broken on purpose" in line for line in written.getvalue().splitlines())


@pytest.mark.parametrize("terminal", [False, True])
def test_what_makes_no_artefact_is_named_while_it_works(runner: Runner, terminal: bool) -> None:
    file = io.StringIO()
    runner.display = Display(Console(file=file, width=200, force_terminal=terminal))

    def action(fails: bool) -> tuple[int, bool]:
        assert "register" in file.getvalue() and (runner.display._bar is not None) is terminal
        if fails:
            raise StageError("no registry")
        return 1, False

    assert runner.act("register", lambda: action(False), "mlflow") == 1
    with pytest.raises(StageError):
        runner.act("register", lambda: action(True), "mlflow")
    assert runner.display._bar is None and [stage["state"] for stage in runner.stages] == ["computed", "failed"]


@pytest.mark.parametrize(
    ("states", "failed", "said"),
    [
        (["cached", "cached"], [], "Nothing to compute: all 2 stages were cached.\n"),
        (["cached", "cached"], ["quantize awq-4bit"], "0 stages computed, 2 cached, in 9 s.\n1 failed: quantize awq-4bit\n"),
        (["computed", "cached"], ["a", "b"], "1 stages computed, 1 cached, in 9 s.\n2 failed: a, b\n"),
    ],
)
def test_what_fails_each_time_is_not_called_nothing_to_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], states: list[str], failed: list[str], said: str
) -> None:
    report = {
        "stages": [{"state": state} for state in states], "failed_stages": failed, "wall_s": 9.1, "variants": [],
        "recommendation": {"cpu": None, "why": "good"},
        "gate": {"verdict": "hold", "checks": []}, "overhead": {"wall_s": 0},
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    _say_where(load_settings(), tmp_path)
    assert said in capsys.readouterr().out
