"""The seam: keys, cache, corruption, failure, resume after a kill, and no process left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tasks.core import child
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.manifests import MANIFEST, Manifest, damage_of
from tasks.core.progress import Event
from tasks.domain.errors import UserError
from tests.tiny_stages import AddConfig, CountConfig, FillConfig, add, count, fill, resumed, stepwise

pytestmark = pytest.mark.fast
REPOSITORY = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[Manifest, str]]


@pytest.fixture
def store(home: Path) -> Store:
    return Store((home / "store").as_uri(), home)


@pytest.fixture
def run(store: Store, home: Path) -> Run:
    def call(
        stage: seam.Stage, config: seam.StageConfig, on_event: Callable[[Event], None] = lambda event: None, **inputs: Manifest
    ) -> tuple[Manifest, str]:
        return seam.run(stage, config, inputs, store, home / "logs", on_event)

    return call


def test_second_call_is_cached_and_equal(run: Run) -> None:
    first, state = run(count, CountConfig())
    again, state_again = run(count, CountConfig())
    assert (state, state_again) == ("computed", "cached")
    assert first == again
    assert first.metrics["pid"] != os.getpid()
    assert first.peak_rss_mb and first.peak_rss_mb > 1


@pytest.mark.slow
def test_a_changed_field_recomputes_what_depends_on_it(run: Run) -> None:
    numbers, _ = run(count, CountConfig())
    assert run(add, AddConfig(), numbers=numbers)[0].metrics["total"] == 3
    more, state = run(count, CountConfig(numbers=4))
    assert state == "computed" and more.key != numbers.key
    assert run(add, AddConfig(), numbers=more)[0].metrics["total"] == 6
    assert run(add, AddConfig(), numbers=numbers)[1] == "cached"


@pytest.mark.slow
def test_equal_content_from_another_config_does_not_recompute_what_follows(run: Run) -> None:
    numbers, _ = run(count, CountConfig())
    run(add, AddConfig(), numbers=numbers)
    same, state = run(count, CountConfig(seconds=0.001))
    assert state == "computed" and same.digest == numbers.digest
    assert run(add, AddConfig(), numbers=same)[1] == "cached"


@pytest.mark.slow
def test_keys_are_the_same_in_every_process() -> None:
    code = "from tests.tiny_stages import *; print(count.key(CountConfig(), {}))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert keys == {count.key(CountConfig(), {}) + "\n"}


def damage_delete(folder: Path) -> None:
    (folder / "1.txt").unlink()


def damage_truncate(folder: Path) -> None:
    (folder / "1.txt").write_text("")


def damage_flip(folder: Path) -> None:
    (folder / "1.txt").write_text("7")


def damage_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def damage_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def damage_other_manifest(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, "key": "0" * 32}))


def damage_bit(path: Path) -> None:
    """One bit of the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_a_figure(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert '"numbers": 3' in text
    (folder / MANIFEST).write_text(text.replace('"numbers": 3', '"numbers": 2'))


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        damage_delete,
        damage_truncate,
        damage_flip,
        damage_manifest,
        damage_no_manifest,
        damage_everything,
        damage_other_manifest,
        damage_a_figure,
    ],
)
def test_a_damaged_artefact_is_rebuilt(run: Run, store: Store, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    first, _ = run(count, CountConfig())
    folder = store.path("count", first.key)
    damage(folder)
    again, state = run(count, CountConfig())
    assert state == "computed" and again.digest == first.digest
    assert (folder / "1.txt").read_text() == "1"
    if damage is not damage_everything:
        assert str(folder) in caplog.text


@pytest.mark.slow
def test_an_artefact_of_an_earlier_version_has_no_checksum_and_is_used(run: Run, store: Store) -> None:
    first, _ = run(count, CountConfig())
    path = store.path("count", first.key) / MANIFEST
    path.write_text(first.model_copy(update={"sha256": ""}).model_dump_json())
    assert run(count, CountConfig())[1] == "cached"
    path.write_text(first.model_copy(update={"sha256": "", "digest": "0" * 64}).model_dump_json())
    assert run(count, CountConfig())[1] == "computed"


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["0.txt", "no number.txt", MANIFEST])
def test_nothing_is_made_from_an_input_that_was_damaged_since_it_was_found(run: Run, store: Store, home: Path, damaged: str) -> None:
    numbers, _ = run(count, CountConfig())
    folder = store.path("count", numbers.key)
    if damaged == "no number.txt":  # on which the stage itself fails
        (folder / "0.txt").write_text("x")
    else:
        damage_bit(folder / damaged)
    with pytest.raises((StageError, UserError), match=r"damaged meanwhile|Run the same command again"):
        run(add, AddConfig(), numbers=numbers)
    assert not store.path("add", add.key(AddConfig(), {"numbers": numbers})).exists() and not list((home / "store").glob(".partial/*"))
    assert run(add, AddConfig(), numbers=run(count, CountConfig())[0])[0].metrics["total"] == 3


@pytest.mark.slow
def test_damage_is_noticed_where_the_clock_was_put_back(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, _ = run(count, CountConfig())
    folder = store.path("count", numbers.key)
    touched = {path: path.stat().st_ctime_ns for path in folder.iterdir()}
    damage_bit(folder / "0.txt")
    stat = Path.stat

    def as_before(path: Path, **how: Any) -> Any:  # what a file system says whose clock was put back before the damage
        found = stat(path, **how)
        return SimpleNamespace(st_ctime_ns=touched[path], st_size=found.st_size, st_mode=found.st_mode) if path in touched else found

    monkeypatch.setattr(Path, "stat", as_before)
    assert damage_of(folder, numbers, only_touched=True) is None
    monkeypatch.setattr("tasks.core.manifests.time.time_ns", lambda: min(touched.values()) - 1)
    assert "0.txt has been changed" in str(damage_of(folder, numbers, only_touched=True))


@pytest.mark.slow
def test_what_was_made_and_could_not_be_handed_over_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://cartwright-late-{os.getpid()}", tmp_path)

    def refuse(*_: Any) -> None:
        raise OSError("the storage does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_upload", refuse)
        with pytest.raises(OSError, match="does not answer"):
            seam.run(count, CountConfig(), {}, store, tmp_path / "logs")
    computed: list[Event] = []
    made, _ = seam.run(count, CountConfig(), {}, store, tmp_path / "logs", computed.append)
    assert not computed and made.metrics and not store.partial("count", made.key).exists()
    assert Store(store.uri, tmp_path / "other").find("count", made.key)[0] == made
    damaged = store.partial("count", made.key)
    shutil.copytree(store.path("count", made.key), damaged)
    store.remove("count", made.key)
    store.fs.rm(store.root, recursive=True)
    damage_bit(damaged / "0.txt")
    again, _ = seam.run(count, CountConfig(), {}, store, tmp_path / "logs", computed.append)
    assert computed and again.metrics["pid"] != made.metrics["pid"] and again.files == made.files


def test_a_failed_stage_leaves_no_artefact_and_names_its_log(run: Run, store: Store) -> None:
    with pytest.raises(StageError, match="broken on purpose") as error:
        run(count, CountConfig(fail="error"))
    log = Path(str(error.value).rsplit("Its log: ", 1)[1])
    assert "Traceback" in log.read_text()
    assert not (store.path("count", count.key(CountConfig(fail="error"), {}))).exists()


@pytest.mark.slow
def test_a_killed_child_is_a_failure_with_its_signal(run: Run) -> None:
    with pytest.raises(StageError, match="killed by signal 9"):
        run(count, CountConfig(fail="killed"))


@pytest.mark.slow
def test_a_user_error_crosses_the_process(run: Run) -> None:
    with pytest.raises(UserError, match=r"count.numbers = 3: is unlucky. Allowed: 1, 2."):
        run(count, CountConfig(fail="user"))


@pytest.mark.slow
def test_events_arrive_in_order(run: Run) -> None:
    events: list[Event] = []
    run(count, CountConfig(), events.append)
    assert [event["done"] for event in events if "done" in event] == [0, 1, 2, 3]
    assert [event["metrics"]["number"] for event in events if "metrics" in event] == [0, 1, 2]


DRIVER = """
import sys, pathlib
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tests import tiny_stages as t
home = pathlib.Path(sys.argv[1])
stage = getattr(t, sys.argv[2])
config = t.CountConfig.model_validate_json(sys.argv[3])
manifest, state = seam.run(stage, config, {}, Store((home / "store").as_uri(), home), home / "logs", lambda e: print(__import__("json").dumps(e), flush=True))
print(state, manifest.metrics)
"""


def start(home: Path, stage: str, config: CountConfig) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(home), stage, config.model_dump_json()], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )


def read_until(process: subprocess.Popen[str], wanted: Callable[[Any], bool]) -> Any:
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        if wanted(event):
            return event
    raise AssertionError("the process ended first")


@pytest.mark.slow
def test_killing_the_parent_kills_the_whole_tree(home: Path) -> None:
    process = start(home, "parent", CountConfig())
    pids = read_until(process, lambda event: "metrics" in event)["metrics"]
    tree = [psutil.Process(int(pid)) for pid in pids.values()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(tree, timeout=20)
    assert len(gone) == 2 and not alive


@pytest.mark.parametrize("stage", ["count", "resumed"])
@pytest.mark.slow
def test_after_a_kill_the_same_call_completes_and_uses_nothing_half_written(home: Path, run: Run, store: Store, stage: str) -> None:
    config = CountConfig(numbers=6, seconds=0.15)
    process = start(home, stage, config)
    read_until(process, lambda event: event.get("done") == 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    target = {"count": count, "resumed": resumed}[stage]
    key = target.key(config, {})
    assert not store.path(stage, key).exists()
    manifest, state = run(target, config)
    assert state == "computed" and len(manifest.files) == 6
    if stage == "resumed":
        assert 0 < manifest.metrics["made"] <= 3


@pytest.mark.slow
def test_two_processes_make_an_artefact_once(home: Path) -> None:
    config = CountConfig(numbers=3, seconds=0.3)
    both = [start(home, "count", config) for _ in range(2)]
    last = [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]
    assert sorted(line.split()[0] for line in last) == ["cached", "computed"]


@pytest.mark.slow
def test_remote_store_hands_artefacts_over(tmp_path: Path) -> None:
    uri = f"memory://cartwright-{os.getpid()}"
    one, two = Store(uri, tmp_path / "one"), Store(uri, tmp_path / "two")
    manifest, state = seam.run(count, CountConfig(), {}, one, tmp_path / "logs")
    found, state_two = seam.run(count, CountConfig(), {}, two, tmp_path / "logs")
    assert (state, state_two) == ("computed", "cached") and found == manifest
    assert (two.path("count", manifest.key) / "2.txt").read_text() == "2"
    (two.path("count", manifest.key) / "2.txt").write_text("x")
    assert two.find("count", manifest.key)[0] == manifest  # fetched again


def test_an_address_with_a_password_is_no_store_and_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://\*\*\*@bucket.*AWS_ACCESS_KEY_ID") as refused:
        Store("s3://ana:planted@bucket/cartwright", tmp_path)
    assert "planted" not in str(refused.value)


@pytest.mark.slow
def test_checkpoints_are_kept_until_the_manifest_is_written(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as changed, pytest.raises(OSError, match="No space"):
        changed.setattr(seam, "describe_files", full)
        seam.run(stepwise, CountConfig(), {}, store, tmp_path / "logs")
    made, state = seam.run(stepwise, CountConfig(), {}, store, tmp_path / "logs")
    assert state == "computed" and made.metrics["begun"] == CountConfig().numbers and set(made.files) == {"total.txt"}
    assert {path.name for path in store.path("stepwise", made.key).iterdir()} == {MANIFEST, "total.txt"}


def test_an_unwritable_store_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="may need"):
        Store((tmp_path / "store").as_uri(), tmp_path).check_writable(10**18)
    with pytest.raises(UserError, match="cannot be written"):
        Store((tmp_path / "file" / "store").as_uri(), tmp_path).check_writable()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tiny_disk: Path, tmp_path: Path) -> None:
    store = Store((tiny_disk / "store").as_uri(), tiny_disk)
    kept, _ = seam.run(count, CountConfig(), {}, store, tmp_path / "logs")
    for said in (True, False):  # neither is a stage that failed, which a run may do without
        with pytest.raises(OSError, match="the disk is full"):
            seam.run(fill, FillConfig(megabytes=4, said=said), {}, store, tmp_path / "logs")
    assert seam.run(count, CountConfig(), {}, store, tmp_path / "logs") == (kept, "cached")
    assert seam.run(fill, FillConfig(megabytes=0), {}, store, tmp_path / "logs")[1] == "computed"


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (ValueError("the format cannot be made"), False),
    ],
)
def test_who_has_no_memory_left_is_told_what_to_do(error: Exception, short: bool) -> None:
    assert ("make room, or leave this variant out" in child._mend(error)) == short
