"""Manifests: what an artefact is, what it was made from, what it holds; and whether it still holds that."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tasks.core.file_hash import sha256_file

MANIFEST = "manifest.json"
LARGEST_NOTE = 64_000_000  # bytes of a manifest, or of a note between machines


def _plain_name(name: str) -> str:
    """A name that stands for something in its own folder, whatever the system, and for nothing else."""
    if not re.fullmatch(r"[\w.+=@ -]+", name) or name.strip(". ") == "" or len(name.encode()) > 240:
        raise ValueError("is no plain name")
    return name


def _name_below(name: str) -> str:
    """A POSIX path of a file below a folder. Another machine wrote it: it must not lead out of there, nor to the manifest."""
    for part in name.split("/"):
        _plain_name(part)
    if len(name) > 1000 or PurePosixPath(name).name in (MANIFEST, NEW_MANIFEST):
        raise ValueError("is no name of a file of an artefact")
    return name


NEW_MANIFEST = MANIFEST + ".new"
CHECKPOINTS = "checkpoints"  # folder of what an interrupted stage goes on from; no part of its artefact
Name = Annotated[str, AfterValidator(_plain_name)]
NameBelow = Annotated[str, AfterValidator(_name_below)]


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """All that passes between stages: what an artefact is, what it was made from, and what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Name
    key: Name
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    files: dict[NameBelow, FileEntry]
    digest: str
    metrics: dict[str, Any]
    libraries: dict[str, str]
    hardware: str
    wall_s: float
    peak_rss_mb: float | None
    created: str
    sha256: str = ""  # of all the rest; empty in one of an earlier version

    def sealed(self) -> Manifest:
        """The same with its checksum."""
        return self.model_copy(update={"sha256": self._sum()})

    @property
    def is_intact(self) -> bool:
        """Whether it says what it said when it was made."""
        return self.sha256 == self._sum() if self.sha256 else self.digest == digest_of(self.files)

    def _sum(self) -> str:
        plain = json.loads(self.model_dump_json(exclude={"sha256"}, exclude_unset=True))
        return checksum(plain)

    @property
    def size_mb(self) -> float:
        return sum(entry.size for entry in self.files.values()) / 1e6


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, no NaN. Keys and digests are made from it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def checksum(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` by POSIX path relative to it, except the manifest and what an interrupted stage would go on from."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, NEW_MANIFEST))
    names = [(path.relative_to(folder).as_posix(), path) for path in paths if not path.is_relative_to(folder / CHECKPOINTS)]
    return {name: FileEntry(sha256=sha256_file(path), size=path.stat().st_size) for name, path in names}


def digest_of(files: dict[str, FileEntry]) -> str:
    return hashlib.sha256(canonical_json({name: entry.sha256 for name, entry in files.items()}).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, which somebody else may have written.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none, it names files outside its folder, or it is too large.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_NOTE + 1)
    if len(data) > LARGEST_NOTE:
        raise ValueError(f"has more than {LARGEST_NOTE:,} bytes")
    return Manifest.model_validate_json(data)


def reason_of(error: Exception) -> str:
    return f"{error.error_count()} problems" if isinstance(error, ValidationError) else str(error)


def own_manifest(folder: Path, kind: str, key: str) -> tuple[Manifest | None, str | None]:
    """The manifest of an artefact, or what is wrong with it; neither if there is no folder."""
    path = folder / MANIFEST
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return None, f"{folder} has no {MANIFEST}" if folder.exists() else None
    except (ValueError, IsADirectoryError) as error:
        return None, f"{path} cannot be read ({reason_of(error)})"
    if (manifest.kind, manifest.key) != (kind, key):
        return None, f"{path} belongs to {manifest.kind} {manifest.key}"
    if not manifest.is_intact:
        return None, f"{path} has been changed since it was made"
    return manifest, None


def damage_of(folder: Path, manifest: Manifest, only_touched: bool = False) -> str | None:
    """What is wrong with an artefact's files, or None if they are what its manifest says.

    Args:
        only_touched: read only those that something was done to after the manifest was written, which is the last to be.
    """
    inside = folder.resolve()
    finished = (folder / MANIFEST).stat().st_ctime_ns if only_touched and (folder / MANIFEST).exists() else 0
    if finished > time.time_ns():  # the clock was put back since, and what was done later may look earlier
        finished = 0
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if not path.resolve().is_relative_to(inside):
            return f"{path} is a link to a file elsewhere"
        if path.stat().st_size != entry.size:
            return f"{path} has {path.stat().st_size} bytes instead of {entry.size}"
    for name, entry in manifest.files.items():
        if (folder / name).stat().st_ctime_ns > finished and sha256_file(folder / name) != entry.sha256:
            return f"{folder / name} has been changed since it was made"
    return None
