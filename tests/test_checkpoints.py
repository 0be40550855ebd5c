"""Checkpoints that a kill or a disk spoilt are not gone on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.checkpoints import SEAL, newest_whole, seal
from tests.test_stage import damage_bit

pytestmark = pytest.mark.fast


def cut(folder: Path) -> None:
    (folder / "weights").write_bytes(b"12")


def flip(folder: Path) -> None:
    damage_bit(folder / "weights")


def delete(folder: Path) -> None:
    (folder / "weights").unlink()


def unsealed(folder: Path) -> None:
    (folder / SEAL).unlink()


def torn_seal(folder: Path) -> None:
    damage_bit(folder / SEAL)


@pytest.mark.parametrize("spoil", [cut, flip, delete, unsealed, torn_seal])
def test_the_newest_whole_one_is_taken_and_a_spoilt_one_goes(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    assert newest_whole(tmp_path / "nothing") is None
    for step in (2, 9, 10):  # by number, not by name
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"1234")
        seal(folder)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    spoil(tmp_path / "checkpoint-10")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-9"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9"]
