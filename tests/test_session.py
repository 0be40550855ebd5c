"""Which interrupted run in MLflow a run may take up, and how MLflow's records are kept."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import traceback
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from flows.session import _mine, alone, open_run, opened
from tasks.config import load_config
from tasks.core.display import Display
from tasks.core.settings import load_settings
from tasks.core.tracking import Tracker, client_of, open_parent, write_ahead
from tasks.domain.errors import UserError
from tests.conftest import REPOSITORY
from tests.lessons import holding

pytestmark = pytest.mark.fast
HERE = {"mlflow.source.git.commit": "c1", "cartwright.opened_by": "host:/home", "cartwright.flow_run": "f2"}
CONFIG = load_config("smoke")


def test_a_run_takes_up_what_was_left_in_its_own_home_by_the_same_code() -> None:
    assert _mine({**HERE, "cartwright.flow_run": "f1"}, HERE, CONFIG)
    assert not _mine({**HERE, "cartwright.flow_run": "f1", "mlflow.source.git.commit": "c0"}, HERE, CONFIG)
    assert _mine({**HERE, "cartwright.opened_by": "other:/home", "mlflow.source.git.commit": "c0"}, HERE, CONFIG)  # the very flow run
    assert _mine({"mlflow.source.git.commit": "c1", "cartwright.opened_by": "other:/home"}, HERE, CONFIG)  # no flow run works on it


@pytest.mark.slow
def test_a_run_that_was_renamed_in_mlflow_to_what_is_no_name_of_a_folder_is_one_clear_error(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "run_name", property(lambda tracker: "../../x"))
    with (
        pytest.raises(UserError, match=r"run = '\.\./\.\./x': has a name in MLflow that no folder can have"),
        open_run(CONFIG, load_settings(), Display(), here=False),
    ):
        pass
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        assert database.execute("select status from runs").fetchall() == [("FAILED",)]  # and not one that is said to go on


@pytest.mark.slow
def test_a_flow_run_that_begins_anew_finds_its_run_although_that_has_ended(home: Path) -> None:
    def opened(**tags: str) -> tuple[str, bool]:
        tracker = open_parent(load_settings(), "domain/base", "key", "run", {f"cartwright.{name}": tag for name, tag in tags.items()})
        tracker.end("FINISHED")
        return tracker.parent, tracker.resumed

    first, resumed = opened(flow_run="f1")
    assert not resumed and opened(flow_run="f1") == (first, True)
    other, resumed = opened(flow_run="f2")
    assert other != first and not resumed
    left = open_parent(load_settings(), "domain/base", "key", "run", {"cartwright.flow_run": "f3"})
    assert opened(flow_run="f4", opened_by="me") == (left.parent, True) and left.tag("flow_run") == "f4"
    taken = open_parent(load_settings(), "domain/base", "key", "run", {"cartwright.flow_run": "f4"}, mine=lambda tags: False)
    assert not taken.resumed


@pytest.mark.slow
def test_of_a_run_that_was_made_twice_since_an_answer_was_lost_one_stays(home: Path) -> None:
    """MLflow's client sends a request once more when its answer was lost, and the server makes a second run."""
    tags = {"cartwright.opened_by": "me"}
    first = open_parent(load_settings(), "domain/base", "key", "run", tags)
    client, experiment = first.client, first.experiment_id
    same = {"cartwright.kind": "pipeline", "cartwright.pipeline_key": "key"}
    now = client.get_run(first.parent).info.start_time
    others, earlier, ghost = (
        client.create_run(experiment, now + later, run_name=name, tags={**same, "cartwright.opened_by": by}).info.run_id
        for later, name, by in ((1, "run", "you"), (2, "an earlier run", "me"), (3, "run", "me"))
    )
    taken = open_parent(load_settings(), "domain/base", "key", "run", tags)
    left = {run.info.run_id: run.info.status for run in client.search_runs([experiment])}
    assert taken.parent == ghost and left == {ghost: "RUNNING", earlier: "KILLED", others: "RUNNING"}  # the first of the two has gone

    stage = taken.child("count", "k", "stage")
    client.create_run(
        experiment, run_name="count", tags={"cartwright.kind": "stage", "cartwright.key": "k", "mlflow.parentRunId": taken.parent}
    )
    taken.end("FINISHED")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{taken.parent}'")
    assert [(run.info.run_id, run.info.status) for run in children] == [(stage, "FINISHED")]


@pytest.mark.slow
def test_what_goes_on_below_a_run_of_this_home_that_has_ended_is_ended_by_the_next(home: Path) -> None:
    """A server that answers and does nothing, or answers something else, has left them so."""
    mine, theirs, ours = (
        open_parent(load_settings(), "domain/base", key, "run", {"cartwright.opened_by": by})
        for key, by in (("a", "me"), ("b", "you"), ("c", "me"))
    )
    left, elsewhere, goes_on = (tracker.child("count", "k", "stage") for tracker in (mine, theirs, ours))  # `ours` is killed below
    below = {"mlflow.parentRunId": mine.parent}
    by_hand = mine.client.create_run(mine.experiment_id, run_name="a look at it", tags=below).info.run_id  # somebody's own
    for tracker in (mine, theirs):
        tracker.client.set_terminated(tracker.parent, "FAILED")
    gone = {"cartwright.kind": "stage", "mlflow.parentRunId": "0" * 32}
    without_parent = mine.client.create_run(mine.experiment_id, run_name="count", tags=gone).info.run_id
    open_parent(load_settings(), "domain/base", "d", "run", {})
    assert mine.client.get_run(left).info.status == "RUNNING"  # whose home it is is not known
    open_parent(load_settings(), "domain/base", "c", "another commit", {"cartwright.opened_by": "me"}, mine=lambda tags: False)
    now = {run: mine.client.get_run(run).info.status for run in (left, elsewhere, goes_on, without_parent, by_hand)}
    assert now == {left: "FAILED", elsewhere: "RUNNING", goes_on: "KILLED", without_parent: "RUNNING", by_hand: "RUNNING"}


@pytest.mark.slow
def test_a_run_that_was_killed_ends_when_its_home_opens_another_and_is_taken_up_again(home: Path) -> None:
    settings, running = load_settings(), UserError("run", "x", "is running already")

    def opening(key: str) -> Tracker:
        return open_parent(settings, "domain/base" if key < "c" else "domain/other", key, "run", opened(settings, f"run-{key}"))

    with alone(settings, "run-a", running):
        killed = opening("a")
        stage = killed.child("count", "k", "stage")
    (home / "locks" / "run-a.lock").touch()  # as a kill leaves it
    with alone(settings, "run-b", running), alone(settings, "run-c", running):
        others = [opening("b"), opening("c")]
        now = {name: killed.client.get_run(run).info.status for name, run in (("killed", killed.parent), ("stage", stage))}
        assert now == {"killed": "KILLED", "stage": "KILLED"}
        assert [tracker.client.get_run(tracker.parent).info.status for tracker in others] == ["RUNNING", "RUNNING"]
        again = opening("a")
    assert (again.parent, again.resumed, again.client.get_run(again.parent).info.status) == (killed.parent, True, "RUNNING")
    assert again.client.get_run(again.child("count", "k", "stage")).info.status == "RUNNING"  # it is computed anew
    again.end("FINISHED")
    assert opening("a").parent != killed.parent


@pytest.mark.slow
def test_what_was_killed_under_the_lock_that_is_held_now_ends_too_and_a_lock_is_a_name(home: Path, tmp_path: Path) -> None:
    settings, running = load_settings(), UserError("model", "m", "is being checked already")
    with alone(settings, "drift-m", running):
        monday = open_parent(settings, "domain/base", "monday", "run", opened(settings, "drift-m"))
        tuesday = open_parent(settings, "domain/base", "tuesday", "run", opened(settings, "drift-m"))
        now = [tracker.client.get_run(tracker.parent).info.status for tracker in (monday, tuesday)]
        assert now == ["KILLED", "RUNNING"]
    with alone(settings, "ablation-recipe", running):
        first, second = (
            open_parent(settings, f"{shop}-ablation", "ablation-recipe", "ablation-recipe", opened(settings, "ablation-recipe"))
            for shop in ("one", "other")
        )
        found = first.client.get_run(first.parent).info  # of another shop: it is no copy of the second
        assert (found.status, found.lifecycle_stage) == ("KILLED", "active") and first.parent != second.parent
    elsewhere = tmp_path / "victim.lock"
    elsewhere.write_text("kept")
    planted = open_parent(settings, "domain/base", "planted", "run", opened(settings, "../../victim"))
    open_parent(settings, "domain/base", "next", "run", opened(settings, "run-next"))
    assert elsewhere.read_text() == "kept" and planted.client.get_run(planted.parent).info.status == "RUNNING"


def test_records_in_sqlite_have_a_write_ahead_log_even_if_they_were_made_without(home: Path) -> None:
    settings = load_settings()
    home.mkdir()
    database = home / "mlflow.db"
    with closing(sqlite3.connect(database)) as made:
        made.execute("create table older (id)")

    def mode() -> str:
        with closing(sqlite3.connect(database)) as reader:
            return str(reader.execute("pragma journal_mode").fetchone()[0])

    with closing(sqlite3.connect(database)) as busy:
        busy.execute("begin exclusive")
        write_ahead(settings.mlflow_uri)
        busy.rollback()
        assert mode() == "delete"  # in use: left as it is
    write_ahead(settings.mlflow_uri)
    assert mode() == "wal"
    write_ahead("postgresql://mlflow@nowhere/mlflow")
    write_ahead(f"sqlite:///{home}/nowhere/mlflow.db")
    assert not (home / "nowhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["postgres://ana:planted-pw@db/x", "postgresql+a+b://db/x?user=ana&password=planted-pw"])
def test_an_address_that_mlflow_quotes_is_told_without_its_password(home: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI = 'postgres.*\*\*\*.*is refused") as refused:
        client_of(replace(load_settings(), mlflow_uri=address))
    assert "planted" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.slow
def test_what_mlflow_says_without_a_secret_stays_its_own_error(home: Path) -> None:
    with pytest.raises(Exception, match="postgresqlx") as refused:
        client_of(replace(load_settings(), mlflow_uri="postgresqlx://db/x"))
    assert not isinstance(refused.value, UserError)


REFUSED = """
from dataclasses import replace
from tasks.core.settings import load_settings, prepare_environment
settings = load_settings()
prepare_environment(settings)
from flows.prefect_server import prefect_api
from tasks.core.tracking import open_parent
with prefect_api(settings):
    from prefect import flow

    @flow
    def refused():
        open_parent(replace(settings, mlflow_uri="postgres://ana:planted-pw@db/x"), "domain/base", "key", "run", {})

    print(refused(return_state=True).message)
"""


@pytest.mark.slow
def test_the_password_of_a_refused_address_is_not_in_prefects_records(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and "is refused" in done.stdout, done.stdout + done.stderr
    assert holding(home / "prefect", "MLFLOW_TRACKING_URI") and not holding(home, "planted-pw")
    assert "planted-pw" not in done.stdout + done.stderr
