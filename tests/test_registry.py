"""The registered model's aliases: promotion that takes itself back, and rollback. A real MLflow registry in a file."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import Timeout

from tasks import register, registered
from tasks.core import hardware
from tasks.core.file_hash import sha256_file
from tasks.core.registry import CHAMPION, PREVIOUS, Registry, champion_files
from tasks.core.settings import load_settings
from tasks.core.tracking import open_parent
from tasks.domain.errors import UserError
from tasks.domain.scoring import answer_text, compact_json
from tasks.domain.spec import load_spec
from tasks.register import promote_by_hand
from tasks.registered import problem_of

NAME = "shop-intent"
SPEC = load_spec("ecommerce")


@pytest.fixture
def registry(home: Path) -> Registry:
    """A registry with three versions of a model, each of one file."""
    home.mkdir()
    registry = Registry(load_settings())
    registry.client.create_registered_model(NAME)
    for variant in ("Q8_0", "Q4_0", "Q4_1"):
        (home / variant).mkdir()
        (home / variant / "model.gguf").write_text(variant)
        written = json.dumps({"model.gguf": sha256_file(home / variant / "model.gguf")})
        tags = {"cartwright.variant": variant, "cartwright.digest": variant, "cartwright.files.0": written}
        registry.client.create_model_version(NAME, (home / variant).as_uri(), tags=tags)
    return registry


def test_two_homes_that_share_a_file_of_records_share_its_locks(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", load_settings().mlflow_uri)
    monkeypatch.setenv("CARTWRIGHT_HOME", str(tmp_path / "other"))
    other = Registry(load_settings())
    with registry.registering(NAME), registry.promoting(NAME):  # which a registration that promotes holds both
        for lock in (other.registering(NAME), other._lock(f"promotion-{NAME}")):
            with pytest.raises(Timeout):
                lock.acquire(timeout=0)
    with other.registering(NAME).acquire(timeout=0):
        pass


def aliases(registry: Registry) -> tuple[str | None, str | None]:
    found = [registry.champion(NAME, alias) for alias in (CHAMPION, PREVIOUS)]
    return found[0] and found[0]["version"], found[1] and found[1]["version"]


def decisions(registry: Registry, version: str) -> list[tuple[str, str]]:
    """Verdict and author of every decision that is written on a version."""
    tags = registry.client.get_model_version(NAME, version).tags
    written = [json.loads(value) for name, value in sorted(tags.items()) if name.startswith("cartwright.decision.")]
    return [(decision["verdict"], decision["by"]) for decision in written if decision["when"]]


def test_a_promotion_keeps_the_champion_before_it_and_moves_nothing_when_the_new_one_fails(registry: Registry) -> None:
    assert registry.champion("unknown") is None and aliases(registry) == (None, None)
    assert registry.promote(NAME, "1", lambda: "it does not load") == "it does not load"
    assert aliases(registry) == (None, None)
    assert registry.promote(NAME, "1", lambda: "") == "" and aliases(registry) == ("1", None)
    seen: list[tuple[str | None, str | None]] = []
    registry.promote(NAME, "2", lambda: seen.append(aliases(registry)) or "")  # type: ignore[func-returns-value]
    assert seen == [("1", None)] and aliases(registry) == ("2", "1")  # it proves itself before anybody is given it
    registry.promote(NAME, "3", lambda: "it answers nothing")
    assert aliases(registry) == ("2", "1")
    promoted = registry.champion(NAME)
    assert promoted and promoted["cartwright.promoted"] and "cartwright.promoted" not in registry.client.get_model_version(NAME, "3").tags


def test_of_two_homes_at_one_server_one_promotes_at_a_time(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no lock of the file system in common. A claim in the registry is what they share; here it is in a file."""
    monkeypatch.setattr("tasks.core.registry.by_server", lambda settings: True)
    monkeypatch.setattr("tasks.core.claims.Claim.__init__.__defaults__", (0.3, 600.0))
    monkeypatch.setattr("tasks.core.registry.Registry._lock", lambda self, name: contextlib.nullcontext())
    inside, most, found = [], [], []

    def promote(home: str, version: str) -> None:
        mine = Registry(replace(load_settings(), home=tmp_path / home))
        verdict = {"verdict": "promote", "champion": None, "challenger": version, "checks": []}

        def works(*asked: str) -> str:
            inside.append(home)
            most.append(len(inside))
            time.sleep(0.2)
            inside.remove(home)
            return ""

        monkeypatch.setattr(register, "problem_of", works)
        found.append(register.promote(mine, NAME, version, verdict)["verdict"])

    both = [threading.Thread(target=promote, args=given) for given in (("one", "1"), ("two", "2"))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(found) == ["hold", "promote"] and max(most) == 1  # the second was compared with no champion, and there is one by now
    assert not registry.client.get_registered_model(NAME).tags


def test_a_promotion_that_took_too_long_moves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.core.registry.by_server", lambda settings: True)
    monkeypatch.setattr("tasks.core.claims.Claim.__init__.__defaults__", (0.05, 600.0))

    def works() -> str:
        registry.client.set_registered_model_tag(NAME, "cartwright.promoting", "another:/home 1")
        return ""

    with registry.promoting(NAME):
        assert "another host began to promote" in registry.promote(NAME, "1", works)
    assert aliases(registry) == (None, None)
    assert registry.client.get_registered_model(NAME).tags == {"cartwright.promoting": "another:/home 1"}  # which is not ours to take away


def test_an_interrupted_promotion_leaves_everything_as_it_was(registry: Registry) -> None:
    registry.promote(NAME, "1", lambda: "")

    def stopped() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.promote(NAME, "2", stopped)
    assert aliases(registry) == ("1", None)


def test_rollback_swaps_and_says_what_it_did(registry: Registry) -> None:
    registry.promote(NAME, "1", lambda: "")
    with pytest.raises(UserError, match="no version with the alias previous"):
        registry.rollback(NAME, by="ana")
    with pytest.raises(UserError, match="no version with the alias champion"):
        registry.rollback("unknown", by="ana")
    registry.promote(NAME, "2", lambda: "")
    now, before = registry.rollback(NAME, by="ana")
    assert (now["cartwright.variant"], before["cartwright.variant"]) == ("Q8_0", "Q4_0") and aliases(registry) == ("1", "2")
    assert registry.rolled_back(NAME, "Q4_0") and not registry.rolled_back(NAME, "Q8_0")
    assert decisions(registry, "2") == [("rolled back", "ana")] and decisions(registry, "1") == [("rollback", "ana")]
    registry.rollback(NAME, by="ana")
    assert aliases(registry) == ("2", "1") and registry.rolled_back(NAME, "Q8_0") and not registry.rolled_back(NAME, "Q4_0")


def dies_after(registry: Registry, writes: int, done: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let the machine die before the write to the registry that follows so many; `done` names those that were made."""

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if len(done) == writes:
                raise KeyboardInterrupt
            done.append(write.__name__)
            return write(*arguments)

        return call

    done.clear()
    for name in ("set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag", "delete_model_version_tag"):
        patch.setattr(registry.client, name, dying(getattr(registry.client, name)))


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "3"])
def test_a_promotion_that_was_killed_forgets_no_version(registry: Registry, monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """Wherever it was killed, and whatever is done next: to promote again, or to go back."""
    done: list[str] = []

    def put(champion: str, previous: str | None) -> None:
        registry.client.set_registered_model_alias(NAME, CHAMPION, champion)
        if previous:
            registry.client.set_registered_model_alias(NAME, PREVIOUS, previous)
        else:
            registry.client.delete_registered_model_alias(NAME, PREVIOUS)
        for tag in ("promoted", "rolled_back", "rolling_back"):
            registry.client.delete_model_version_tag(NAME, "2", f"cartwright.{tag}")

    def killed(writes: int) -> bool:
        put("1", before)
        registry.client.set_model_version_tag(NAME, "2", "cartwright.rolled_back", "long ago")
        with monkeypatch.context() as patch:
            dies_after(registry, writes, done, patch)
            try:
                registry.promote(NAME, "2", lambda: "")
            except KeyboardInterrupt:
                return True
        return False

    def notes() -> set[str]:
        tags = {tag for version in "123" for tag in registry.client.get_model_version(NAME, version).tags}
        return tags & {"cartwright.previous_before", "cartwright.rolling_back"}

    for writes in range(20):
        if not killed(writes):
            break
        if aliases(registry)[0] == "1":  # nothing was promoted: the version before is where a rollback goes to, and there may be none
            if before:
                assert [version["version"] for version in registry.rollback(NAME, by="ana")] == [before, "1"], done
            else:
                with pytest.raises(UserError, match="no version with the alias previous"):
                    registry.rollback(NAME, by="ana")
        else:
            assert [version["version"] for version in registry.rollback(NAME, by="ana")] == ["1", "2"], done
        assert not notes(), done
        assert killed(writes)  # the same command finds nothing to promote, or promotes anew
        was = aliases(registry)
        registry.settle(NAME)
        assert not registry.unsettled(NAME) and not notes() and aliases(registry) == (("1", before) if was[0] == "1" else was), done
        assert (registry.rolled_back(NAME, "Q4_0") is None) == (was[0] == "2")
        assert killed(writes)
        registry.promote(NAME, "2", lambda: "")
        assert aliases(registry) == ("2", "1") and not notes() and not registry.rolled_back(NAME, "Q4_0"), done
    assert len(done) == writes >= 5  # all of them were the last once


@pytest.mark.slow
def test_a_rollback_that_was_killed_is_finished_by_the_same_command(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it was killed: after as many writes as there are, one more each time."""
    done: list[str] = []
    for writes in range(20):
        registry.promote(NAME, "1", lambda: "")
        registry.promote(NAME, "2", lambda: "")
        registry.client.set_model_version_tag(NAME, "1", "cartwright.rolled_back", "long ago")
        with monkeypatch.context() as patch:
            dies_after(registry, writes, done, patch)
            try:
                registry.rollback(NAME, by="ana")
            except KeyboardInterrupt:
                pass
            else:
                break
        assert len(done) == writes and bool(registry.rolled_back(NAME, "Q4_0")) == (writes > 0)  # never promoted again in between
        registry.rollback(NAME, by="ana")
        assert aliases(registry) == ("1", "2"), done
        assert registry.rolled_back(NAME, "Q4_0") and not registry.rolled_back(NAME, "Q8_0"), done
    assert len(done) == writes > 10  # all of them were the last once
    registry.rollback(NAME, by="ana")  # and what was finished is not gone on with
    assert aliases(registry) == ("2", "1")


def test_without_a_rollback_nothing_is_guessed_where_both_aliases_are_at_one_version(registry: Registry) -> None:
    registry.promote(NAME, "1", lambda: "")
    registry.client.set_registered_model_alias(NAME, "previous", "1")
    with pytest.raises(UserError, match=r"version 1 as champion and as previous.*cartwright promote"):
        registry.rollback(NAME, by="ana")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda home, registry: (home / "Q8_0" / "model.gguf").write_text("another"),
            r"model\.gguf has been changed since .*cartwright promote",
        ),
        (lambda home, registry: (home / "Q8_0" / "code.py").write_text("evil"), r"code\.py was not registered with it"),
        (lambda home, registry: shutil.rmtree(home / "Q8_0"), r"model\.gguf is missing"),
        (
            lambda home, registry: (home / "Q8_0" / "more").symlink_to("/nowhere"),
            "The files of version 1 cannot be read .*cartwright promote",
        ),
        (
            lambda home, registry: registry.client.delete_model_version_tag(NAME, "1", "cartwright.files.0"),
            "without the hashes .*cartwright run",
        ),
    ],
)
def test_a_rollback_to_what_nobody_would_load_is_refused_and_moves_nothing(
    registry: Registry, home: Path, change: Callable[[Path, Registry], Any], says: str
) -> None:
    registry.promote(NAME, "1", lambda: "")
    registry.promote(NAME, "2", lambda: "")
    change(home, registry)
    with pytest.raises(UserError, match=f"version 2 stays the champion.*{says}"):
        registry.rollback(NAME, by="ana")
    assert aliases(registry) == ("2", "1") and not decisions(registry, "1") and not registry.rolled_back(NAME, "Q4_0")


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda registry: registry.client.set_registered_model_tag(NAME, "cartwright.promoting", "another:/home 1"),
        lambda registry: registry.client.set_registered_model_alias(NAME, CHAMPION, "3"),
    ],
    ids=["another claims", "another promoted"],
)
def test_a_rollback_that_took_too_long_moves_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Registry], None]
) -> None:
    monkeypatch.setattr("tasks.core.registry.by_server", lambda settings: True)
    monkeypatch.setattr("tasks.core.claims.Claim.__init__.__defaults__", (0.05, 600.0))
    registry.promote(NAME, "1", lambda: "")
    registry.promote(NAME, "2", lambda: "")
    check = registry._check

    def slow(*given: str) -> None:
        check(*given)
        meanwhile(registry)

    monkeypatch.setattr(registry, "_check", slow)
    with pytest.raises(UserError, match=r"nothing has moved\. Another host began to promote while the files of version 1 were read"):
        registry.rollback(NAME, by="ana")
    assert aliases(registry)[1] == "1" and not decisions(registry, "1") and not registry.rolled_back(NAME, "Q4_0")


def test_the_registered_model_answers_each_text_with_its_json_and_gives_what_is_none_as_it_was_written() -> None:
    """Its model is replaced by one whose answers come as those of several requests at a time do: the shortest first."""
    from tasks.pyfunc_model import ShopIntent

    milk = {"intent": "add_to_cart", "product": "milk", "quantity": 2}
    written = {1: "no idea", 2: answer_text({"intent": "view_cart"}, SPEC), 0: answer_text(milk, SPEC)}

    def generate(asked: list[Any], *_: int) -> Iterator[Any]:
        assert [conversation[-1]["content"].strip() for conversation in asked] == ["2 milk", "?", "cart"]
        yield from (SimpleNamespace(index=index, text=text) for index, text in written.items())

    model = ShopIntent()
    model._spec, model._model = SPEC, SimpleNamespace(generate=generate)
    assert model.predict(None, ["2 milk", "?", "cart"]) == [compact_json(milk), "no idea", '{"intent":"view_cart"}']


def test_a_champion_whose_files_are_gone_does_not_work(registry: Registry, home: Path) -> None:
    shutil.rmtree(home / "Q8_0")
    problem = problem_of(NAME, "1")
    assert "model.gguf is missing" in problem


def test_a_person_promotes_by_hand_and_what_was_decided_is_written_down(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {"1": "", "2": "", "3": "it answers nothing"}
    monkeypatch.setattr(register, "problem_of", lambda name, version: problems[version])

    def promote(version: str) -> dict[str, Any]:
        return promote_by_hand(registry, NAME, registry.version(NAME, version), by="ana", why="trial")

    assert promote("1")["verdict"] == "promote" and promote("2")["champion"] == "version 1" and aliases(registry) == ("2", "1")
    failed = promote("3")
    assert failed["verdict"] == "hold" and "it answers nothing" in failed["checks"][-1]["name"] and aliases(registry) == ("2", "1")
    assert promote("2")["checks"][-1]["name"] == "it is the champion already"
    assert decisions(registry, "3") == [("hold", "ana")]
    registry.rollback(NAME, by="ben")
    assert registry.rolled_back(NAME, "Q4_0") and promote("2")["verdict"] == "promote" and not registry.rolled_back(NAME, "Q4_0")
    assert registry.version(NAME, None)["version"] == "3"
    with pytest.raises(UserError, match=r"version = '7': is no version of shop-intent .* Allowed: 1, 2, 3"):
        registry.version(NAME, "7")


def test_what_was_compared_with_another_champion_is_held(registry: Registry) -> None:
    registry.promote(NAME, "1", lambda: "")
    verdict = {"verdict": "promote", "champion": None, "checks": []}
    held = register.promote(registry, NAME, "2", verdict)
    assert held["verdict"] == "hold" and "the champion is version 1 by now" in held["checks"][-1]["name"]
    assert aliases(registry) == ("1", None)


def to_log(folder: Path) -> dict[str, Path]:
    """What a model is logged from."""
    files = {"model": folder / "model.gguf", "spec": folder / "spec.yaml"}
    for file in files.values():
        file.write_text("x")
    return files


def test_a_model_that_is_logged_again_after_an_interruption_is_shown_once(home: Path, tmp_path: Path) -> None:
    tracker, files = open_parent(load_settings(), "domain/base", "key", "run", {}), to_log(tmp_path)
    run = tracker.child("gguf-F16", "key", "variant")
    logged = {tracker.log_model(run, "gguf-F16", "digest", files, "llama_cpp") for _ in range(2)}
    assert len(logged) == 1 == len(tracker.client.get_run(run).outputs.model_outputs)


def test_a_model_whose_logging_was_cut_short_is_completed_and_no_other_is_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    tracker, files = open_parent(load_settings(), "domain/base", "key", "run", {}), to_log(tmp_path)
    run = tracker.child("gguf-F16", "key", "variant")

    def killed(**_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mlflow.pyfunc, "log_model", killed)
        tracker.log_model(run, "gguf-F16", "digest", files, "llama_cpp")
    (left,) = tracker.client.search_logged_models([tracker.experiment_id])
    assert str(left.status) == "PENDING"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # who logs it may be at it still, elsewhere
        patch.setattr(mlflow.pyfunc, "log_model", killed)
        tracker.log_model(tracker.child("another", "key2", "variant"), "gguf-F16", "digest", files, "llama_cpp")
    for model in tracker.client.search_logged_models([tracker.experiment_id]):
        if model.model_id != left.model_id:
            tracker.client.delete_logged_model(model.model_id)
            found = model
    assert str(found.status) == "PENDING"
    logged = tracker.log_model(run, "gguf-F16", "digest", files, "llama_cpp")
    (model,) = tracker.client.search_logged_models([tracker.experiment_id])
    assert (model.model_id, str(model.status)) == (logged, "READY") == (left.model_id, "READY")


def test_a_model_of_which_mlflow_heard_twice_since_its_answer_was_lost_is_there_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sends what makes a logged model, or a version, again when it hears nothing."""
    import mlflow

    tracker, files = open_parent(load_settings(), "domain/base", "key", "run", {}), to_log(tmp_path)
    for name in ("initialize_logged_model", "register_model"):
        usual = getattr(mlflow, name)
        monkeypatch.setattr(mlflow, name, lambda *given, usual=usual, **more: (usual(*given, **more), usual(*given, **more))[1])
    logged = tracker.log_model(tracker.child("gguf-F16", "key", "variant"), "gguf-F16", "digest", files, "llama_cpp")
    (model,) = tracker.client.search_logged_models([tracker.experiment_id])
    assert (model.model_id, str(model.status)) == (logged, "READY")
    registry = Registry(load_settings())
    version, known = registry.register(NAME, logged, "digest", {"cartwright.kind": "k"}, "what it is")
    (found,) = registry.client.search_model_versions(f"name = '{NAME}'")
    assert (version, known) == (str(found.version), False) == ("1", False) and found.description == "what it is"
    assert found.tags["cartwright.digest"] == "digest" and registry.register(NAME, logged, "digest", {}, "")[1]


def test_a_champion_whose_files_were_lost_is_told_so(home: Path, tmp_path: Path) -> None:
    tracker, registry = open_parent(load_settings(), "domain/base", "key", "run", {}), Registry(load_settings())
    model_id = tracker.log_model(tracker.child("gguf-F16", "key", "variant"), "gguf-F16", "digest", to_log(tmp_path), "llama_cpp")
    registry.promote(NAME, registry.register(NAME, model_id, "digest", {}, "")[0], lambda: "")
    assert champion_files(load_settings(), NAME)[0].read_text() == "x"
    (lost,) = home.rglob("mlflow-artifacts")
    shutil.rmtree(lost)
    with pytest.raises(UserError, match=f"{NAME} version 1': the storage .* no longer has its files .*promote VERSION.*deleted in MLflow"):
        champion_files(load_settings(), NAME)


def test_what_a_killed_registration_left_in_the_temporary_folder_goes_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "tmp" / NAME
    (folder / "tmpabc").mkdir(parents=True)
    (folder / "tmpabc" / "model.gguf").write_text("x")
    before = tempfile.gettempdir()
    with register._temporary_files_in(folder):
        assert not list(folder.iterdir())
        assert Path(tempfile.mkdtemp()).parent == folder
    assert tempfile.gettempdir() == before and not folder.exists()


def test_a_disk_that_is_full_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow tells nothing of why a file could not be copied."""

    def lost(*_: Any) -> Any:
        raise UserError("champion", "version 1", "cannot be asked (INTERNAL_ERROR)")

    monkeypatch.setattr(registered, "champion_files", lost)
    with pytest.raises(UserError):
        registered._answer(NAME, "1")
    monkeypatch.setattr(hardware, "FULL", 10**18)  # more than is free here
    with pytest.raises(SystemExit) as ended:
        registered._answer(NAME, "1")
    ended_with = subprocess.CompletedProcess([], int(str(ended.value.code)), "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended_with)
    with pytest.raises(OSError, match="the disk is full"):
        problem_of(NAME, "1")


@pytest.mark.parametrize(
    ("error", "full"), [(OSError(28, "No space"), True), (OSError(122, "Quota"), True), (OSError(13, "Denied"), False)]
)
def test_a_full_disk_is_found_behind_the_errors_it_caused(error: OSError, full: bool) -> None:
    try:
        try:
            raise error
        except OSError as cause:
            raise RuntimeError("cannot save") from cause
    except RuntimeError as raised:
        assert hardware.says_full(raised) is full


def test_what_a_version_s_page_says_of_it_can_be_done_as_it_stands() -> None:
    exact = {"value": 0.9, "low": 0.88, "high": 0.92, "n": 300}
    quality, speed = {"exact_match": exact, "hard_exact_match": None}, {"requests_s": 10.0, "requests_s_batched": 20.0}
    variant = {"name": "gguf-Q8_0", "quality": quality, "performance": speed, "fidelity": None, "size_mb": 145.0}
    about = register.describe("shop-intent", variant, "run", "mlflow_run")
    assert "90.0% (88.0% to 92.0%, 300 rows)" in about and "not measured" in about
    assert about.index("`MLFLOW_TRACKING_URI=... .venv/bin/python`") < about.index('load_model("models:/shop-intent@champion")')
