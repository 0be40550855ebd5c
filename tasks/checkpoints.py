"""Checkpoints that an interrupted stage may go on from: checksums, written last, say which of them are whole."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from tasks.core.manifests import describe_files

logger = logging.getLogger("cartwright")

SEAL = "whole.json"


def seal(folder: Path) -> None:
    """Say that a checkpoint is finished, and what is in it."""
    new = folder / (SEAL + ".new")
    new.write_text(json.dumps(_sums(folder)), encoding="utf-8")
    new.replace(folder / SEAL)


def newest_whole(checkpoints: Path) -> Path | None:
    """The last `checkpoint-<step>` in a folder that is what it was when it was sealed; None if there is none.

    Later ones, which a kill or a full disk cut short or something changed since, are removed: Trainer would take one up, and
    fail on it or learn from it, each time the stage is tried again.
    """
    found = {int(path.name.partition("-")[2]): path for path in checkpoints.glob("checkpoint-*")}
    for _, folder in sorted(found.items(), reverse=True):
        if _is_whole(folder):
            return folder
        logger.warning("%s is not whole and is not used", folder)
        shutil.rmtree(folder)
    return None


def _is_whole(folder: Path) -> bool:
    try:
        sealed = json.loads((folder / SEAL).read_bytes())
    except (FileNotFoundError, ValueError):  # also bytes that are no text
        return False
    return bool(sealed == _sums(folder))


def _sums(folder: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in describe_files(folder).items() if not name.startswith(SEAL)}
