"""What passes between a retraining and the workers of its pools."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import releasing, stages
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
    errand.send(store, RUN)
    taken, run, arguments = read_errand(store, errand.name, stages.measure, store.uri)
    assert run == RUN and tuple(arguments) == given
    result = ({"evaluate:gguf-Q4_0": manifest("e")}, {"gguf-F16": "no disk"}, {})
    taken.answer(store, stages.measure, result, [{"name": "evaluate", "state": "cached"}])
    assert errand.result(store, stages.measure) == (result, [{"name": "evaluate", "state": "cached"}])


def test_a_result_may_be_a_manifest_or_a_reason_or_several(store: Store) -> None:
    for stage_flow, given, results in (
        (
            stages.train,
            (manifest("a"),),
            tuple((manifest("b"), manifest("c"), manifest("d"), last) for last in (manifest("e"), "no memory")),
        ),
        (releasing.compare, (manifest("a"), manifest("c"), manifest("b"), None), ((manifest("r"), manifest("m"), manifest("t")),)),
    ):
        errand = errand_for(RUN, stage_flow, given)
        for result in results:
            errand.answer(store, stage_flow, result, [])
            assert errand.result(store, stage_flow) == (result, [])


def test_the_same_work_of_the_same_run_has_the_same_name() -> None:
    def name(run: Run, key: str) -> str:
        return errand_for(run, stages.train, (manifest(key),)).name

    again = RUN.model_copy(update={"started": "later", "resumed": True})
    assert name(RUN, "a") == name(again, "a") != name(RUN, "other")
    assert name(RUN.model_copy(update={"mlflow_run": "n"}), "a") != name(RUN, "a")


def test_a_worker_with_another_store_says_so(tmp_path: Path) -> None:
    theirs, mine = (Store((tmp_path / name).as_uri(), tmp_path / "home") for name in ("theirs", "mine"))
    errand = errand_for(RUN, stages.make_data, (None,))
    errand.send(theirs, RUN)
    with pytest.raises(UserError, match=r"CARTWRIGHT_STORE = .*mine.*not the store of the flow that sent this work, .*theirs"):
        read_errand(mine, errand.name, stages.make_data, theirs.uri)


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
