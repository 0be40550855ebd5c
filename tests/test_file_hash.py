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
    monkeypatch.setattr(file_hash, "SETTLED_NS", 0)
    monkeypatch.setattr(file_hash, "_digest", lambda file: (seen.append(Path(file.name).name), digest(file))[1])
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


def test_what_was_written_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    assert sha256_file(path) == sha(b"a")
    with path.open("r+b") as file:
        file.write(b"b")
    assert sha256_file(path) == sha(b"b")


def test_who_asks_while_a_file_is_being_read_waits_for_that(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    time.sleep(0.02)
    begun, go_on, digest = threading.Event(), threading.Event(), file_hash._digest

    def slowly(file: io.FileIO) -> str:
        begun.set()
        assert go_on.wait(30)
        return digest(file)

    monkeypatch.setattr(file_hash, "_digest", slowly)
    read_ahead([lambda: sha256_file(path)])
    assert begun.wait(30)
    threading.Timer(0.2, go_on.set).start()
    assert sha256_file(path) == sha(b"weights")
    assert reads == ["weights"]


def test_a_file_that_cannot_be_read_stops_neither_the_others_nor_the_next_attempt(tmp_path: Path, reads: list[str]) -> None:
    path, done = tmp_path / "weights", threading.Event()
    read_ahead([lambda: sha256_file(path), done.set])
    assert done.wait(30)
    path.write_bytes(b"there now")
    time.sleep(0.02)
    assert sha256_file(path) == sha(b"there now")


def test_artefacts_of_the_latest_run_are_verified_before_they_are_asked_for(settings: Settings, reads: list[str]) -> None:
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
    (store.path("merge", "damaged") / "damaged.safetensors").write_bytes(b"w3ights")
    time.sleep(0.02)
    latest = settings.reports / "latest"
    latest.mkdir(parents=True)
    stages = [{"kind": "merge", "key": "whole"}, {"kind": "merge", "key": "damaged"}, {"kind": None, "key": ""}]
    (latest / "report.json").write_text(json.dumps({"profile": "smoke", "stages": stages}), encoding="utf-8")
    assert latest_artefacts(settings, "quick") == []
    ahead = latest_artefacts(settings, "smoke")
    reads.clear()
    file_hash._read.clear()  # a process that did not make them
    store.read_ahead(ahead)
    deadline = time.monotonic() + 30
    while len(reads) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.find("merge", "whole")[0] and "has been changed" in str(store.find("merge", "damaged")[1])
    assert sorted(reads) == ["damaged.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("text", ["", "[]", '{"profile": "smoke", "stages": [3]}', '{"profile": "smoke"}'])
def test_a_report_that_cannot_be_read_is_no_reason_to_stop(settings: Settings, text: str) -> None:
    assert latest_artefacts(settings, "smoke") == []
    (settings.reports / "latest").mkdir(parents=True)
    (settings.reports / "latest" / "report.json").write_text(text, encoding="utf-8")
    assert latest_artefacts(settings, "smoke") == []
