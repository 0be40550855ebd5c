"""Labelled files of a team on their way to workers that have another home, or run on another host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.file_hash import sha256_file
from tasks.domain.errors import UserError
from tasks.own_files import OwnFilesConfig, own_files, paths_in
from tests.conftest import REPOSITORY

ROWS = ("show me what is in my basket please", "what have I got in my basket so far")


def labelled(path: Path, text: str) -> Path:
    path.write_text(json.dumps({"text": text, "gold": {"intent": "view_cart"}, "language": "en"}) + "\n", encoding="utf-8")
    return path


def given(*paths: Path, field: str = "data.extra") -> OwnFilesConfig:
    return OwnFilesConfig(field=field, paths=tuple(map(str, paths)), sha256=tuple(map(sha256_file, paths)))


@pytest.mark.fast
def test_another_machine_reads_the_same_bytes_in_the_same_order_after_the_files_are_gone(tmp_path: Path) -> None:
    one, two = (Store(f"memory://{tmp_path.name}", tmp_path / name) for name in ("one", "two"))
    first, second = labelled(tmp_path / "b.jsonl", ROWS[0]), labelled(tmp_path / "a.jsonl", ROWS[1])
    wanted, config = [first.read_bytes(), second.read_bytes()], given(first, second)
    made, _ = seam.run(own_files, config, {}, one, tmp_path / "logs")
    first.unlink()
    second.unlink()
    assert [path.read_bytes() for path in paths_in(two.fetch(made), config.sha256)] == wanted
    elsewhere = config.model_copy(update={"paths": ("/gone", "/too"), "field": "registry.own_rows"})
    assert own_files.key(elsewhere, {}) == made.key != own_files.key(config.model_copy(update={"sha256": config.sha256[::-1]}), {})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "says"), [(lambda path: path.write_text("{}"), "has changed since the run began"), (Path.unlink, "No such file")]
)
def test_files_that_change_before_they_are_in_the_store_are_refused(tmp_path: Path, change: Callable[[Path], Any], says: str) -> None:
    store, path = Store((tmp_path / "store").as_uri(), tmp_path), labelled(tmp_path / "own.jsonl", ROWS[0])
    config = given(path, field="registry.own_rows")
    change(path)
    with pytest.raises(UserError, match=rf"registry\.own_rows = .*own\.jsonl.*{says}"):
        seam.run(own_files, config, {}, store, tmp_path / "logs")
    assert store.find("own_files", own_files.key(config, {})) == (None, None)


# Parent and worker as two homes with one store. The files go before the worker begins.
HANDED_OVER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from tasks.core.settings import load_settings, prepare_environment
parents = load_settings()
prepare_environment(parents)
from flows import releasing, stages
from flows.errands import errand_for, read_errand
from flows.prefect_server import prefect_api
from flows.session import join_run, open_run
from tasks.config import load_config, resolve
from tasks.core.artifacts import Store
from tasks.core.display import Display
from tasks.gate_rows import gate_rows, gate_rows_config

extra, own, there = map(Path, sys.argv[1:])
small = {"data.train_rows": 48, "data.languages": ["en"], "data.patterns_per_intent": 12, "registry.test_rows": 24}
config = resolve(load_config("smoke", {**small, "data.extra": [str(extra)], "registry.own_rows": [str(own)]}))
workers = replace(parents, home=there)
with prefect_api(parents):
    with open_run(config, parents, Display()) as run:
        files, asked = stages.own_rows(run)
        sent = errand_for(run, stages.make_data, (files,))
        sha256 = sent.send(Store(parents.store_uri, parents.home), run)
    extra.unlink()
    own.unlink()
    with join_run(run, workers, Display(), "cpu") as call:
        _, run, given = read_errand(call.store, sent.name, sha256, stages.make_data, "")
        dataset, _ = stages.make_data.fn(run, *given)
        rows = call(gate_rows, gate_rows_config(run.config.data, run.config.registry), dataset=dataset, own=asked)
print(json.dumps({"data": dataset.metrics["origins"]["train"], "rows": rows.metrics["rows"]}))
"""


def test_a_worker_with_another_home_trains_on_and_asks_the_files_that_only_the_parent_had(home: Path, tmp_path: Path) -> None:
    extra, own = labelled(tmp_path / "extra.jsonl", ROWS[0]), labelled(tmp_path / "own.jsonl", ROWS[1])
    command = [sys.executable, "-c", HANDED_OVER, str(extra), str(own), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["data"]["extra"] == 1 and figures["rows"]["own"] == 1
