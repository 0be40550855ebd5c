"""Files of one's own, as the stages that read them are given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.core.file_hash import sha256_file
from tasks.own_files import OwnFilesConfig, own_files
from tasks.synthesize import SynthesizeConfig, synthesize


def put(folder: Path, *paths: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of the stage `own_files`, and the files' digests."""
    folder.mkdir(parents=True)
    digests = tuple(map(sha256_file, paths))
    own_files.function(OwnFilesConfig(field="test", paths=tuple(map(str, paths)), sha256=digests), {}, folder)
    return folder, digests


def synthesize_with(data: SynthesizeConfig, extra: Path, folder: Path) -> dict[str, Any]:
    """Make a data set with a file of one's own in training; its metrics."""
    copies, digests = put(folder.parent / f"{folder.name}-extra", extra)
    folder.mkdir(exist_ok=True)
    return synthesize.function(data.model_copy(update={"extra": (str(extra),), "extra_sha256": digests}), {"extra": copies}, folder)
