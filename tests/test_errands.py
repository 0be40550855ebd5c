"""What passes between a retraining and the workers of its pools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect import flow
from pydantic import ValidationError
from rich.console import Console

from flows import pools, releasing, stages
from flows.errands import errand_for, read_errand
from flows.session import Run
from tasks.config import load_config
from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.domain.errors import UserError
from tasks.variants import Variant

pytestmark = pytest.mark.fast
RUN = Run(run_id="r", mlflow_run="m", config=load_config("smoke"), started="2026-01-01T00:00:00+00:00", resumed=False)


def manifest(key: str) -> Manifest:
    facts = {
        "kind": "merge",
        "key": key,
        "version": 1,
        "digest": "d",
        "hardware": "h",
        "wall_s": 1.5,
        "peak_rss_mb": None,
        "created": "now",
    }
    return Manifest.model_validate({**facts, "config": {}, "inputs": {}, "files": {}, "metrics": {"loss": 0.1}, "libraries": {}})


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store((tmp_path / "store").as_uri() if request.param == "file" else f"memory://{tmp_path.name}", tmp_path / "home")


def test_arguments_and_results_come_out_as_they_went_in(store: Store) -> None:
    variant = Variant(name="gguf-Q4_0", format="gguf", bits=4, runtime="llama_cpp", role="candidate")
    given = ([variant], {"gguf-Q4_0": manifest("a")}, manifest("data"), {"gguf-F16": "no disk"})
    errand = errand_for(RUN, stages.measure, given)
    sent = errand.send(store, RUN)
    taken, run, arguments = read_errand(store, errand.name, sent, stages.measure, store.uri)
    assert run == RUN and tuple(arguments) == given
    result = ({"evaluate:gguf-Q4_0": manifest("e")}, {"gguf-F16": "no disk"}, {})
    left = taken.answer(store, stages.measure, result, [{"name": "evaluate", "state": "cached"}])
    assert errand.result(store, stages.measure, left) == (result, [{"name": "evaluate", "state": "cached"}])


def test_a_result_may_be_a_manifest_or_a_reason_or_several(store: Store) -> None:
    for stage_flow, given, results in (
        (
            stages.train,
            (manifest("a"),),
            tuple((manifest("b"), manifest("t"), manifest("c"), manifest("d"), last) for last in (manifest("e"), "no memory")),
        ),
        (releasing.compare, (manifest("a"), manifest("c"), manifest("b"), None), ((manifest("r"), manifest("m"), manifest("t")),)),
    ):
        errand = errand_for(RUN, stage_flow, given)
        for result in results:
            left = errand.answer(store, stage_flow, result, [])
            assert errand.result(store, stage_flow, left) == (result, [])


def test_the_same_work_of_the_same_run_has_the_same_name() -> None:
    def name(run: Run, key: str) -> str:
        return errand_for(run, stages.train, (manifest(key),)).name

    again = RUN.model_copy(update={"started": "later", "resumed": True})
    assert name(RUN, "a") == name(again, "a") != name(RUN, "other")
    assert name(RUN.model_copy(update={"mlflow_run": "n"}), "a") != name(RUN, "a")


def test_a_worker_with_another_store_says_so(tmp_path: Path) -> None:
    theirs, mine = (Store((tmp_path / name).as_uri(), tmp_path / "home") for name in ("theirs", "mine"))
    errand = errand_for(RUN, stages.make_data, (None,))
    sent = errand.send(theirs, RUN)
    with pytest.raises(UserError, match=r"CARTWRIGHT_STORE = .*mine.*not the store of the flow that sent this work, .*theirs"):
        read_errand(mine, errand.name, sent, stages.make_data, theirs.uri)


def change_notes(store: Store, old: str, new: str) -> None:
    """What somebody may do who can write to the store."""
    for path in store.fs.find(f"{store.root}/notes"):
        text = store.fs.cat_file(path).decode()
        assert old in text
        store.fs.pipe_file(path, text.replace(old, new).encode())


def test_an_order_that_was_changed_on_the_way_is_refused_before_anything_is_done(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker sends the teacher's key to the address that the order's configuration names."""
    done: list[Run] = []

    @flow(name="data")
    def stage_flow(run: Run, key: str) -> str:
        done.append(run)
        return key

    @contextmanager
    def join_run(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(stages=[])

    monkeypatch.setattr(pools, "Store", lambda *_: store)
    monkeypatch.setattr(pools, "join_run", join_run)
    monkeypatch.setattr(pools, "run_log", Console)
    on_worker = pools._on_worker(stage_flow, torch=False).fn
    run = RUN.model_copy(update={"config": load_config("smoke", {"data.teacher": "openai/m", "teacher.api_base": "https://ours.test"})})
    errand = errand_for(run, stage_flow, ("k",))
    sent = errand.send(store, run)
    state = on_worker(errand.name, sent, store.uri)
    assert done == [run] and errand.result(store, stage_flow, state.message) == ("k", [])
    done.clear()
    store.fs.rm(f"{store.root}/notes", recursive=True)
    assert errand.send(store, run) == sent
    change_notes(store, "https://ours.test", "https://evil.test")
    with pytest.raises(UserError, match=r"notes/m/data-.* is no note of Cartwright \(has been changed since it was left\)"):
        on_worker(errand.name, sent, store.uri)
    assert not done


def test_a_result_that_was_changed_on_the_way_is_refused(store: Store) -> None:
    errand = errand_for(RUN, stages.make_data, (None,))
    left = errand.answer(store, stages.make_data, manifest("d"), [])
    change_notes(store, '"loss": 0.1', '"loss": 0.0')
    with pytest.raises(UserError, match="has been changed since it was left"):
        errand.result(store, stages.make_data, left)


def test_an_order_of_an_earlier_life_of_the_run_stays_what_its_worker_was_given(store: Store) -> None:
    errand, again = errand_for(RUN, stages.make_data, (None,)), RUN.model_copy(update={"started": "later", "resumed": True})
    sent = {errand.send(store, run): run for run in (RUN, again)}
    assert len(sent) == 2
    for sha256, run in sent.items():
        assert read_errand(store, errand.name, sha256, stages.make_data, store.uri)[1] == run


@pytest.mark.parametrize("name", ["../../../x", "/x", "a/b", "..", "", "a\\b", "a\0b"])
def test_a_run_has_no_name_that_leads_out_of_its_folders(name: str) -> None:
    facts = RUN.model_dump()
    assert Run.model_validate(facts) == RUN
    for field in ("run_id", "mlflow_run"):
        with pytest.raises(ValidationError, match="is no plain name"):
            Run.model_validate({**facts, field: name})


def test_an_artefact_of_another_machine_is_fetched_when_it_is_needed(tmp_path: Path) -> None:
    there, here = (Store(f"memory://shared-{tmp_path.name}", tmp_path / name) for name in ("there", "here"))
    folder = there.partial("merge", "k")
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    from tasks.core.manifests import describe_files, digest_of

    files = describe_files(folder)
    made = manifest("k").model_copy(update={"files": files, "digest": digest_of(files)})
    there.commit(folder, made)
    assert (here.fetch(made) / "weights").read_text() == "w"
    with pytest.raises(UserError, match="merge gone is not in memory://"):
        here.fetch(manifest("gone"))
