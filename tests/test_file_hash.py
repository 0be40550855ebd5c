"""Files are read once while nothing is done to them, and again as soon as something was."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
from pathlib import Path

import pytest

from tasks.core import file_hash
from tasks.core.artifacts import Store
from tasks.core.file_hash import read_ahead, sha256_file
from tasks.core.manifests import Manifest, describe_files, digest_of
from tasks.core.settings import Settings, load_settings
from tasks.report import latest_artefacts

pytestmark = pytest.mark.fast


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose bytes were read, in order. Files settle at once, so that no test waits."""
    seen: list[str] = []
    digest = file_hash._digest

    def noted(file: io.FileIO, identity: file_hash._Identity, stop: threading.Event | None) -> str:
        seen.append(Path(str(file.name)).name)
        return digest(file, identity, stop)

    monkeypatch.setattr(file_hash, "SETTLED_NS", 0)
    monkeypatch.setattr(file_hash, "_digest", noted)
    monkeypatch.setattr(file_hash, "_read", {})
    return seen


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("CARTWRIGHT_HOME", str(tmp_path))
    monkeypatch.delenv("CARTWRIGHT_STORE", raising=False)
    return load_settings()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_was_not_touched_is_read_once_and_what_was_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    data, path = os.urandom(file_hash.AT_ONCE + 12_345), tmp_path / "weights"
    path.write_bytes(data)
    time.sleep(0.02)
    assert sha256_file(path) == sha256_file(path) == sha(data)
    assert reads == ["weights"]
    times = path.stat()
    with path.open("r+b") as file:  # one byte, and the times put back as they were: the kernel notes the change all the same
        file.seek(77)
        file.write(bytes([data[77] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(0.02)
    assert sha256_file(path) == sha(data[:77] + bytes([data[77] ^ 1]) + data[78:])
    assert reads == ["weights", "weights"]


def test_what_was_written_a_moment_ago_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr(file_hash, "_read", {})
    monkeypatch.setattr(file_hash, "_identity", lambda file: (0, 0, 1, now, now))  # a clock that shows no change
    path = tmp_path / "weights"
    for data in (b"a", b"b"):
        path.write_bytes(data)
        assert sha256_file(path) == sha(data)


def slow(monkeypatch: pytest.MonkeyPatch, *first: Exception) -> tuple[threading.Event, threading.Event]:
    """Let the first reading begin, set the one event, wait for the other, and raise what is given, if anything is."""
    begun, go_on, digest, raised = threading.Event(), threading.Event(), file_hash._digest, list(first)

    def slowly(file: io.FileIO, identity: file_hash._Identity, stop: threading.Event | None) -> str:
        if not begun.is_set():
            begun.set()
            assert go_on.wait(30)
            if raised:
                raise raised.pop()
        return digest(file, identity, stop)

    monkeypatch.setattr(file_hash, "_digest", slowly)
    return begun, go_on


def settled(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    time.sleep(0.02)
    return path


def test_who_asks_while_a_file_is_being_read_waits_for_that(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = settled(tmp_path / "weights", b"weights")
    begun, go_on = slow(monkeypatch)
    read_ahead([path])
    assert begun.wait(30)
    threading.Timer(0.2, go_on.set).start()
    assert sha256_file(path) == sha(b"weights")
    assert reads == ["weights"]


def test_what_another_could_not_read_is_tried_again(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = settled(tmp_path / "weights", b"weights")
    begun, go_on = slow(monkeypatch, OSError("the disk is tired"))
    read_ahead([path])
    assert begun.wait(30)
    threading.Timer(0.2, go_on.set).start()
    assert sha256_file(path) == sha(b"weights")
    assert sha256_file(path) == sha(b"weights") and reads == ["weights"]


def test_what_is_changed_while_it_is_read_is_not_remembered(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = settled(tmp_path / "weights", b"weights")
    begun, go_on = slow(monkeypatch)
    reader = threading.Thread(target=sha256_file, args=(path,))
    reader.start()
    assert begun.wait(30)
    settled(path, b"w3ights")
    go_on.set()
    reader.join()
    assert len(file_hash._read) == 0
    assert sha256_file(path) == sha(b"w3ights")


def test_reading_ahead_goes_on_after_what_cannot_be_read_and_ends_when_it_is_stopped(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = settled(tmp_path / "one", b"1"), settled(tmp_path / "other", b"2")
    begun, go_on = slow(monkeypatch)
    stop = read_ahead([tmp_path / "missing", one, other])
    assert begun.wait(30)
    stop.set()
    go_on.set()
    assert sha256_file(one) == sha(b"1")  # given up there, read here
    time.sleep(0.2)
    assert reads == ["one", "one"]


def test_artefacts_of_the_latest_run_are_read_before_they_are_asked_for(settings: Settings, reads: list[str]) -> None:
    store = Store(settings.store_uri, settings.home)
    for key in ("whole", "damaged"):
        folder = store.partial("merge", key)
        folder.mkdir(parents=True)
        (folder / f"{key}.safetensors").write_bytes(b"weights")
        files = describe_files(folder)
        made = Manifest(
            kind="merge", key=key, version=1, config={}, inputs={}, files=files, digest=digest_of(files), metrics={}, libraries={},
            hardware="", wall_s=0, peak_rss_mb=None, created="",
        )  # fmt: skip
        store.commit(folder, made.sealed())
    settled(store.path("merge", "damaged") / "damaged.safetensors", b"w3ights")
    latest = settings.reports / "latest"
    latest.mkdir(parents=True)
    stages = [{"kind": "merge", "key": key} for key in ("gone", "whole", "damaged")] + [{"kind": None, "key": ""}]
    (latest / "report.json").write_text(json.dumps({"profile": "smoke", "stages": stages}), encoding="utf-8")
    assert latest_artefacts(settings, "quick") == []
    file_hash._read.clear()  # as in a process that did not make them
    reads.clear()
    store.read_ahead(latest_artefacts(settings, "smoke"))
    deadline = time.monotonic() + 30
    while len(file_hash._read) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(reads) == ["damaged.safetensors", "whole.safetensors"]
    assert store.find("merge", "whole")[0] and "has been changed" in str(store.find("merge", "damaged")[1])
    assert len(reads) == 2


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"profile": "smoke", "stages": [3]}', '{"profile": "smoke"}'])
def test_a_report_that_cannot_be_read_is_no_reason_to_stop(settings: Settings, text: str) -> None:
    assert latest_artefacts(settings, "smoke") == []
    (settings.reports / "latest").mkdir(parents=True)
    (settings.reports / "latest" / "report.json").write_text(text, encoding="utf-8")
    assert latest_artefacts(settings, "smoke") == []
