"""The rows of the gate: frozen, of unseen products, and not in the training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import load_config, resolve
from tasks.core import progress
from tasks.domain.errors import UserError
from tasks.gate_rows import gate_rows, gate_rows_config
from tasks.synthesize import read_rows, synthesize
from tests.own import put

SMALL = {"data.train_rows": 48, "data.languages": ["en", "de"], "data.patterns_per_intent": 12, "registry.test_rows": 60}


def made(folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A data set, and the rows of the gate for it."""
    config = resolve(load_config("smoke", {**SMALL, **changes}))
    for name in ("data", "rows"):
        (folder / name).mkdir(parents=True)
    named = {"extra": config.data.extra, "own": config.registry.own_rows}
    inputs = {name: put(folder / name, *map(Path, paths))[0] for name, paths in named.items() if paths}
    synthesize.function(config.data, inputs, folder / "data")
    asked = gate_rows_config(config.data, config.registry)
    return folder / "rows", gate_rows.function(asked, {**inputs, "dataset": folder / "data"}, folder / "rows")


def texts(folder: Path, split: str) -> list[str]:
    return [row["text"] for row in read_rows(folder / f"{split}.jsonl")]


def test_rows_stay_the_same_with_other_training_data_and_begin_with_those_of_test(tmp_path: Path) -> None:
    rows, figures = made(tmp_path / "a")
    other, _ = made(tmp_path / "b", **{"data.train_rows": 96})
    assert figures["rows"] == {"test": 60, "hard": 24}
    assert texts(rows, "test") == texts(other, "test") and texts(rows, "hard") == texts(other, "hard")
    assert texts(rows, "test")[:36] == texts(tmp_path / "a" / "data", "test")
    assert not set(texts(rows, "test")) & set(texts(tmp_path / "a" / "data", "train"))
    assert (rows / "spec.yaml").read_text() == (tmp_path / "a" / "data" / "spec.yaml").read_text()


def test_how_far_the_rows_are_is_told(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    progress.listen(told.append)
    try:
        made(tmp_path)
    finally:
        progress.listen()
    assert {"done": 60, "total": 60, "note": "test"} in told and {"done": 24, "total": 24, "note": "hard"} in told


def test_own_rows_are_asked_too_and_what_was_learnt_or_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    own, learnt = tmp_path / "own.jsonl", tmp_path / "learnt.jsonl"
    first = {"id": "7", "text": "show me what is in my basket please", "gold": {"intent": "view_cart"}, "language": "en"}
    second = {"text": "would you have any purple umbrellas", "gold": {"intent": "search_product", "product": "purple umbrellas"}}
    own.write_text("\n".join([json.dumps(first), json.dumps(second), "not json"]))
    learnt.write_text(json.dumps({**second, "text": "Would you have any purple umbrellas?"}))
    rows, figures = made(tmp_path / "a", **{"registry.own_rows": [str(own)], "data.extra": [str(learnt)]})
    assert [row["id"] for row in read_rows(rows / "own.jsonl")] == ["own-0"]
    assert texts(rows, "own") == [first["text"]] and figures["rows"]["own"] == 1
    assert figures["rejected"]["own: in the training data"] == 1 and figures["rejected"]["own: cannot be used"] == 1


def test_a_file_without_usable_rows_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(UserError, match=r"registry\.own_rows = .*no usable row"):
        resolve(load_config("smoke", {"registry.own_rows": [str(tmp_path / "own.jsonl")]}))
