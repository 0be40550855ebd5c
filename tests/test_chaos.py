"""Faults at seeded moments, the same command again, and nothing lost: a short version of `make chaos`."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tasks.core.manifests import MANIFEST, Manifest, read_manifest
from tests.chaos.command import Command
from tests.chaos.cycle import cycle, registers_anew
from tests.chaos.faults import FAULTS
from tests.chaos.figures import metrics_like, reported
from tests.chaos.invariants import Reader, look, same, settled, violations
from tests.chaos.pipelines import SMALL, SMOKE
from tests.chaos.records import champion_loads, registered
from tests.chaos.world import REGISTER, World, a_world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with a_world(SMALL, tmp_path_factory.mktemp("chaos")) as world:
        yield world


def sql(world: World, *statements: str) -> None:
    """Change MLflow's records."""
    with closing(sqlite3.connect(world.home / "mlflow.db")) as database, database:
        for statement in statements:
            database.execute(statement)


def test_faults_on_a_small_pipeline_lose_nothing(small: World) -> None:
    """One of every kind that is about neither MLflow's server nor a teacher; `make chaos` draws from all."""
    names = [fault.name for fault in FAULTS if not fault.prefect and "MLflow" not in fault.name and "teacher is" not in fault.name]
    struck = run = 0
    for number, name in enumerate(names):
        if small.mounting or name != "the store is read-only":
            found = cycle(small, number, name)
            assert not found.problems, f"{found}\n{found.output}"
            struck, run = struck + found.struck, run + 1
    assert struck > run / 2  # a moment is a time: it can be over


@pytest.mark.slow
def test_wrong_answers_on_a_small_pipeline_lose_nothing(small: World) -> None:
    """Of the teacher and of MLflow, whose server is started once for all."""
    names = [fault.name for fault in FAULTS if fault.name.startswith(("the teacher is", "MLflow "))]
    struck = 0
    for number, name in enumerate(names):
        found = cycle(small, number, name)
        assert not found.problems, f"{found}\n{found.output}"
        struck += found.struck
    assert struck > len(names) / 2  # a moment is a time: it can be over


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

    (total,) = small.store.glob("add/*/total.txt")
    log = small.home / "teacher" / "answers.jsonl"
    assert not problems(lambda: None)
    assert "damaged" in problems(lambda: total.write_text("7"))
    assert "was made again" in problems(lambda: (total.parent / "manifest.json").touch())
    assert "is missing" in problems(lambda: shutil.rmtree(total.parent))
    assert "has total 7, 6 without the fault" in problems(lambda: remade(total.parent, {"total": 7}))
    assert "left RUNNING" in problems(lambda: sql(small, "update runs set status = 'RUNNING' where name = 'count'"))
    assert "runs of the stage same" in problems(lambda: sql(small, "update tags set value = 'same' where key = 'cartwright.key'"))
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


def remade(folder: Path, metrics: dict[str, Any]) -> None:
    """An artefact with other metrics, as if it had been made with them."""
    path = folder / MANIFEST
    was = path.stat()
    path.write_text(read_manifest(path).model_copy(update={"metrics": metrics}).sealed().model_dump_json())
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def made(kind: str, digest: str, metrics: dict[str, Any], **inputs: str) -> Manifest:
    rest = {"version": 1, "config": {}, "files": {}, "libraries": {}, "hardware": "", "wall_s": 1.0, "peak_rss_mb": None, "created": ""}
    return Manifest(kind=kind, key=f"k{digest}", digest=digest, metrics=metrics, inputs=inputs, **rest)


def test_all_that_is_not_made_from_what_varies_has_to_be_there_again(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that fails alone leaves the exit code 0, and its evaluation and its measurement are not in the store."""
    chain = [
        made("evaluate", "1", {}),
        made("benchmark", "2", {}, model="1"),
        made("decide", "3", {}, b="2"),
        made("count", "4", {}, of="3"),
    ]
    monkeypatch.setattr(small, "reference", {(m.kind, m.key): m for m in chain})
    assert settled(small) == {("evaluate", "k1"), ("benchmark", "k2")}
    small.restore()
    assert {f"{kind} k{number} is missing" for kind, number in (("evaluate", 1), ("benchmark", 2))} <= set(same(small))


def test_other_metrics_are_found() -> None:
    trained = made("finetune", "1", {"validation_loss": 0.5, "tokens_per_s": 9.0, "history": [1], "more": {"verdict": "ok"}})
    assert not list(metrics_like(trained, made("finetune", "1", {**trained.metrics, "tokens_per_s": None, "history": []}), varies=False))
    for change in ({"validation_loss": 0.5000001}, {"more": {"verdict": "degraded"}}, {"left_out": 1}):
        assert list(metrics_like(trained, made("finetune", "1", {**trained.metrics, **change}), varies=False)), change
    measured = {"prompt_tokens": 20.0, "completion_tokens": 10.0, "requests_s": 100.0}
    expected = made("benchmark", "1", measured)
    assert not list(metrics_like(made("benchmark", "2", {**measured, "requests_s": 1.0, "completion_tokens": 10.2}), expected, varies=True))
    for change in ({"prompt_tokens": 19.0}, {"completion_tokens": 8.0}):
        assert list(metrics_like(made("benchmark", "2", {**measured, **change}), expected, varies=True)), change


def test_a_report_that_lacks_something_is_found(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    small.restore()
    quality = {"exact_match": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 36}, "json_valid": 1.0}
    whole = {"variants": [{"name": "gguf-Q4_0", "quality": quality}], "recommendation": {"cpu": "gguf-Q4_0"}}
    monkeypatch.setattr(small, "report", whole)

    def problems(**changes: Any) -> str:
        report = small.home / "reports" / "latest" / "report.json"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({**whole, **changes}))
        return "; ".join(reported(small))

    def asked(**changes: Any) -> list[dict[str, Any]]:
        return [{"name": "gguf-Q4_0", "quality": {**quality, "exact_match": {**quality["exact_match"], **changes}}}]

    assert "has no variant gguf-Q4_0" in "; ".join(reported(small))
    assert not problems() and not problems(variants=asked(value=0.52))
    assert "failed: killed" in problems(variants=[{"name": "gguf-Q4_0", "error": "killed", "quality": None}])
    assert "exact_match.n 35" in problems(variants=asked(n=35))
    assert "exact_match.value 0.4" in problems(variants=asked(value=0.4))
    assert "None is recommended" in problems(recommendation={"cpu": None})


A_MODEL = (
    "insert into registered_models (name) values ('shop-intent')",
    "insert into model_versions (name, version, status) values ('shop-intent', 1, 'READY')",
    "insert into model_version_tags (key, value, name, version) values ('cartwright.digest', 'made', 'shop-intent', 1)",
    "insert into registered_model_aliases (alias, version, name) values ('champion', 1, 'shop-intent')",
    "insert into logged_models select 'm-1', min(experiment_id), 'gguf', 'file:///', 0, 0, 2, 'active', '', '', '' from experiments",
)


def test_a_model_that_is_not_registered_as_it_should_be_is_found(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of MLflow's records as `smoke` leaves them: in a small pipeline nothing is registered."""
    monkeypatch.setattr(small, "report", {"gate": {"challenger_sha256": "made"}})

    def problems(*spoil: str, anew: bool = False) -> str:
        small.restore()
        sql(small, *A_MODEL, *spoil)
        return "; ".join(registered(small, anew))

    assert not problems()
    assert "not one whole version" in problems("insert into model_versions (name, version, status) values ('shop-intent', 2, 'READY')")
    assert "not one whole version" in problems("update model_versions set status = 'PENDING_REGISTRATION'")
    assert "not the model of the undisturbed run" in problems("update model_version_tags set value = 'other'")
    assert "aliases are []" in problems("delete from registered_model_aliases")
    assert "previous" in problems("insert into registered_model_aliases (alias, version, name) values ('previous', 1, 'shop-intent')")
    claim = "insert into registered_model_tags (key, value, name) values ('cartwright.promoting', 'me', 'shop-intent')"
    assert "claim" in problems(claim, anew=True) and not problems(claim)
    small.restore()
    assert not list(champion_loads(small, none_yet=True))


def test_about_half_of_the_cycles_register_a_model_anew(small: World, tmp_path: Path) -> None:
    small.restore()
    sql(small, *A_MODEL)
    (small.home / "mlflow-artifacts" / "1" / "models" / "m-1").mkdir(parents=True)
    small.forget_models()
    with closing(sqlite3.connect(small.home / "mlflow.db")) as database:
        left = [database.execute(f"select count(*) from {statement.split()[2]}").fetchone()[0] for statement in A_MODEL]
        assert not any(left) and database.execute("select count(*) from runs").fetchone()[0]
    assert not (small.home / "mlflow-artifacts" / "1" / "models").exists()
    (small.home / "tmp" / "shop-intent").mkdir(parents=True)  # as registering does
    command = Command(0, tmp_path)
    assert small.await_stage(command, REGISTER)
    (small.home / "tmp" / "shop-intent").rmdir()
    command.over(0)
    assert not small.await_stage(command, REGISTER)
    assert not any(registers_anew(small, seed) for seed in range(50))
    whole = World(SMOKE, small.folder, False, small.teacher, small.proxy)
    assert 15 < sum(registers_anew(whole, seed) is not None for seed in range(50)) < 35
