"""Stage `own_files`: labelled files of a team as an artefact, so that a worker elsewhere reads what the parent of the run was given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tasks.core.stage import StageConfig, stage
from tasks.domain.errors import UserError
from tasks.domain.labelled import LARGEST_FILE


class OwnFilesConfig(StageConfig):
    """Files by their digests; `field` is where the configuration names them."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"field", "paths"})
    field: str
    paths: tuple[str, ...]
    sha256: tuple[str, ...]


@stage("own_files", version=1, isolated=False)
def own_files(config: OwnFilesConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Copy each file, byte by byte; `paths_in` finds them.

    Raises:
        UserError: a file cannot be read, or is not the one the run began with.
    """
    copies = paths_in(out_dir, config.sha256)
    for path, digest, copy in zip(config.paths, config.sha256, copies, strict=True):
        try:
            with Path(path).open("rb") as file:
                data = file.read(LARGEST_FILE + 1)  # one that has grown beyond that has another digest, too
        except OSError as error:
            mend = "Restore it or correct the path"
            raise UserError(config.field, path, f"cannot be read ({error.strerror})", mend=mend) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(config.field, path, "has changed since the run began", mend="Run again when it is complete")
        copy.write_bytes(data)
    return {"files": len(copies), "bytes": sum(copy.stat().st_size for copy in copies)}


def paths_in(folder: Path, sha256: tuple[str, ...]) -> list[Path]:
    """The files of the stage's folder, in the order of their digests."""
    return [folder / f"{number}.jsonl" for number in range(len(sha256))]
