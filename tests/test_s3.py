"""A store on S3, as machines share it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tests.tiny_stages import CountConfig, count


@pytest.fixture
def reached(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return s3


def test_artefacts_and_notes_are_handed_over(reached: dict[str, str], tmp_path: Path) -> None:
    uri = f"s3://shop/{tmp_path.name}"
    one, two = Store(uri, tmp_path / "one"), Store(uri, tmp_path / "two")
    one.check_writable()
    assert two.find("count", seam.Stage.key(count, CountConfig(), {})) == (None, None)
    manifest, state = seam.run(count, CountConfig(), {}, one, tmp_path / "logs")
    found, state_two = seam.run(count, CountConfig(), {}, two, tmp_path / "logs")
    assert (state, state_two) == ("computed", "cached") and found == manifest
    assert (two.path("count", manifest.key) / "2.txt").read_text() == "2"
    with pytest.raises(FileNotFoundError):
        two.read_note("notes/a")
    one.write_note("notes/a", "ž")
    assert two.read_note("notes/a") == "ž"
    assert "probe" not in " ".join(one.fs.find(one.root))


def test_what_was_damaged_there_is_made_anew(reached: dict[str, str], tmp_path: Path) -> None:
    uri = f"s3://shop/{tmp_path.name}"
    one, two = Store(uri, tmp_path / "one"), Store(uri, tmp_path / "two")
    manifest, _ = seam.run(count, CountConfig(), {}, one, tmp_path / "logs")
    one.fs.pipe_file(f"{one.root}/count/{manifest.key}/{manifest.digest}/1.txt", b"7")
    found, state = seam.run(count, CountConfig(), {}, two, tmp_path / "logs")
    assert state == "computed" and found.digest == manifest.digest
    three = Store(uri, tmp_path / "three")
    assert three.find("count", manifest.key)[0] == found
    two.fs.rm_file(f"{one.root}/count/{manifest.key}/{manifest.digest}/1.txt")
    assert "is missing" in str(Store(uri, tmp_path / "four").find("count", manifest.key)[1])


@pytest.mark.parametrize(("address", "says"), [("", "nowhere"), ("http://127.0.0.1:9", "shop")])
def test_a_store_that_cannot_be_written_stops_before_any_work(
    s3: dict[str, str], home: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]], address: str, says: str
) -> None:
    variables = {**s3, **({"AWS_ENDPOINT_URL": address, "AWS_MAX_ATTEMPTS": "1"} if address else {})}
    done = cartwright("run", "--profile", "smoke", CARTWRIGHT_STORE=f"s3://{says}/store", **variables)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"CARTWRIGHT_STORE = 's3://{says}/store': cannot be written" in done.stderr and s3["AWS_SECRET_ACCESS_KEY"] not in done.stderr
    assert not (home / "mlflow.db").exists()


def test_texts_may_be_there(reached: dict[str, str], tmp_path: Path) -> None:
    from tasks.recent_texts import read_texts

    with fsspec.open(f"s3://shop/{tmp_path.name}/today.jsonl", "wb") as file:
        file.write(b'{"text": "two shoes"}\n')
    assert read_texts(f"s3://shop/{tmp_path.name}/*.jsonl", 10).texts == ["two shoes"]
