"""Two machines that share a remote store, and no lock, make the same artefact at once, each with other bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest, describe_files, digest_of

KIND, FILES = "finetune", ("a.bin", "deep/b.bin", "c.bin")


def commit(store: Store, key: str, content: str) -> Manifest:
    """Make an artefact whose files all say the same, in as many bytes whoever makes it: what a size cannot tell."""
    folder = store.partial(KIND, key)
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    files = describe_files(folder)
    facts: dict[str, Any] = {"version": 1, "hardware": "h", "wall_s": 1.0, "peak_rss_mb": None, "created": content, "libraries": {}}
    facts |= {"kind": KIND, "key": key, "files": files, "digest": digest_of(files), "config": {}, "inputs": {}, "metrics": {}}
    return store.commit(folder, Manifest.model_validate(facts).sealed())


def read(store: Store, key: str) -> str | None:
    """What a machine finds: the content of one whole artefact, or None for none. Damage is neither."""
    manifest, damage = store.find(KIND, key)
    assert damage is None
    if not manifest:
        return None
    (said,) = {(store.fetch(manifest) / name).read_text() for name in FILES}
    assert manifest.created == said
    return said


@pytest.mark.fast
@pytest.mark.parametrize(
    ("conditional", "moment"), [(True, moment) for moment in range(len(FILES) + 1)] + [(False, moment) for moment in range(len(FILES) + 2)]
)
def test_wherever_one_is_interrupted_by_the_other_all_find_one_whole_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conditional: bool, moment: int
) -> None:
    """The first machine is stopped before its n-th write; the other makes all of its own meanwhile. A third looks before every write.

    A storage that cannot write only what is new is asked twice to write the manifest.
    """
    uri = f"memory://{tmp_path.name}"
    one, two = (Store(uri, tmp_path / name) for name in ("one", "two"))
    seen: list[str | None] = []
    put, pipe = one.fs.put_file, one.fs.pipe_file

    def watched(write: Callable[..., Any]) -> Callable[..., Any]:
        def before(*given: Any, **how: Any) -> Any:
            number = len(seen)
            seen.append(read(Store(uri, tmp_path / f"reader-{number}"), "k"))
            if number == moment:
                commit(two, "k", "two")
            if how.get("mode") == "create" and not conditional:
                raise NotImplementedError
            return write(*given, **how)

        return before

    monkeypatch.setattr(one.fs, "put_file", watched(put))
    monkeypatch.setattr(one.fs, "pipe_file", watched(pipe))
    made = commit(one, "k", "one")
    last = "two" if moment <= len(FILES) else "one"
    assert len(seen) > len(FILES) + 2 and made.created == last
    assert [read(Store(uri, tmp_path / "last"), "k"), read(one, "k"), read(two, "k")] == [last] * 3
    assert two.fetch(made) and not one.partial(KIND, "k").exists()


@pytest.mark.fast
def test_who_looks_an_artefact_up_does_not_disturb_a_run_of_the_same_home_that_copies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"memory://{tmp_path.name}"
    commit(Store(uri, tmp_path / "maker"), "k", "made there")
    run, predict = (Store(uri, tmp_path / "home") for _ in range(2))
    get, started, seen = run.fs.get_file, threading.Event(), list[Any]()
    other = threading.Thread(target=lambda: seen.append(predict.look_up(KIND, "k")))

    def slowly(*given: Any) -> Any:
        if not started.is_set():
            started.set()
            get(*given)
            other.start()
            other.join(0.3)  # long enough to remove what was copied, if nothing kept it from that
            return None
        return get(*given)

    monkeypatch.setattr(run.fs, "get_file", slowly)
    with run.lock(KIND, "k"):
        found = run.find(KIND, "k")
    other.join()
    assert found[0] and found == seen[0] and read(run, "k") == "made there"


def at_once(one: Store, two: Store, rounds: int) -> None:
    for number in range(rounds):
        key, start, errors = f"k{number}", threading.Barrier(2), []

        def work(store: Store, content: str, key: str = key, start: threading.Barrier = start, errors: list[Any] = errors) -> None:
            try:
                start.wait()
                commit(store, key, content)
            except BaseException as error:
                errors.append(error)

        both = [threading.Thread(target=work, args=(store, content)) for store, content in ((one, "one"), (two, "two"))]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert not errors
        found = read(Store(one.uri, one.path(KIND, key).parents[3] / f"reader-{number}"), key)
        assert found in ("one", "two") and read(one, key) == read(two, key) == found


@pytest.mark.fast
@pytest.mark.slow
def test_commits_at_the_same_time_end_as_one_artefact(tmp_path: Path) -> None:
    at_once(*(Store(f"memory://{tmp_path.name}", tmp_path / name) for name in ("one", "two")), rounds=60)


def test_commits_at_the_same_time_end_as_one_artefact_on_s3(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    at_once(*(Store(f"s3://shop/{tmp_path.name}", tmp_path / name) for name in ("one", "two")), rounds=20)


@pytest.mark.fast
def test_a_copy_here_gives_way_to_what_was_made_anew_there(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}"
    one, two = (Store(uri, tmp_path / name) for name in ("one", "two"))
    commit(one, "k", "one")
    assert read(two, "k") == "one"
    one.fs.rm(f"{one.root}/{KIND}/k", recursive=True)
    anew = commit(Store(uri, tmp_path / "three"), "k", "two")
    assert (two.fetch(anew) / "a.bin").read_text() == "two"  # a worker that kept an old copy is given what it was sent
    assert read(one, "k") == "two"
    one.fs.pipe_file(f"{one.root}/{KIND}/k/manifest.json", b"{}")
    assert read(one, "k") == "two"  # whole here, damaged there: nothing is lost
