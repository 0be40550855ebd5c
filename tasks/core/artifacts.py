"""The content-addressed store. An artefact exists only when its manifest does: written last, then one atomic rename.

Storage is an fsspec URI: `file://` (used in place), or a remote such as `s3://`, whose artefacts are copied to and from
a local folder. A failure of the storage raises; it is never taken for a missing artefact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import fsspec
from filelock import FileLock
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tasks.domain.errors import UserError

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
        plain = json.loads(self.model_dump_json(exclude={"sha256"}))
        return hashlib.sha256(canonical_json(plain).encode()).hexdigest()

    @property
    def size_mb(self) -> float:
        return sum(entry.size for entry in self.files.values()) / 1e6


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, no NaN. Keys and digests are made from it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` except the manifest, by POSIX path relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_file(path), size=path.stat().st_size) for path in paths}


def digest_of(files: dict[str, FileEntry]) -> str:
    return hashlib.sha256(canonical_json({name: entry.sha256 for name, entry in files.items()}).encode()).hexdigest()


class Store:
    """A folder of artefacts, `<kind>/<key>/`, at an fsspec URI.

    Args:
        uri: where artefacts live and other machines find them.
        local: a folder of this machine for work in progress and, if `uri` is remote, for copies.
    """

    def __init__(self, uri: str, local: Path) -> None:
        self.uri = uri
        try:
            self.fs, root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:  # a package for it is missing, or nobody knows it
            raise UserError("CARTWRIGHT_STORE", uri, f"cannot be used ({error})", mend="For s3:// there is `pip install 's3fs'`") from None
        self.is_local = urlsplit(uri).scheme in ("", "file")
        self.root = unquote(urlsplit(uri).path) if self.is_local else root
        self._artefacts = Path(self.root) if self.is_local else local / "copies"
        self._local = local

    # Folders of this machine -------------------------------------------------------------------------------------

    def path(self, kind: str, key: str) -> Path:
        """Where an artefact's files are, or will be, on this machine."""
        return self._artefacts / kind / key

    def fetch(self, manifest: Manifest) -> Path:
        """The folder of an artefact's files on this machine; copied from where another machine put them if they are not here yet.

        Raises:
            UserError: neither here nor there, or by now another one is.
        """
        folder = self.path(manifest.kind, manifest.key)
        if not self.is_local and not (folder / MANIFEST).exists():
            with self.lock(manifest.kind, manifest.key):
                self.find(manifest.kind, manifest.key)
        found, damage = _own_manifest(folder, manifest.kind, manifest.key)
        problem = damage if damage and folder.exists() else f"{manifest.kind} {manifest.key} is not in {self.uri}"
        if found and found.digest != manifest.digest:
            problem = f"{manifest.kind} {manifest.key} was made anew meanwhile and holds something else"
        elif found:
            return folder
        raise UserError("store", self.uri, problem, mend="Run the same command again: what is missing is made anew")

    def partial(self, kind: str, key: str) -> Path:
        """Where an artefact is being made. Named by key, so that a restarted stage finds its checkpoints."""
        return (self._artefacts if self.is_local else self._local) / ".partial" / f"{kind}-{key}"

    def lock(self, kind: str, key: str) -> FileLock:
        """Held while an artefact is looked up or made: two runs never make the same one twice. Freed by the kernel on death."""
        folder = self._artefacts / ".locks" if self.is_local else self._local / "locks"  # homes that share a store share its locks
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{kind}-{key}.lock")

    # Artefacts ---------------------------------------------------------------------------------------------------

    def find(self, kind: str, key: str) -> tuple[Manifest | None, str | None]:
        """Look an artefact up and verify every file of it.

        Returns:
            (manifest, None) if it is whole, (None, None) if there is none, (None, why) if it is damaged.
        """
        if not self.is_local and self._find_here(kind, key)[0] is None and (damage := self._download(kind, key)):
            return None, damage
        return self._find_here(kind, key)

    def _find_here(self, kind: str, key: str) -> tuple[Manifest | None, str | None]:
        folder = self.path(kind, key)
        manifest, damage = _own_manifest(folder, kind, key)
        if not manifest:
            return None, damage
        damage = damage_of(folder, manifest)
        return (None, damage) if damage else (manifest, None)

    def commit(self, folder: Path, manifest: Manifest) -> None:
        """Turn a finished folder into an artefact: manifest written and flushed, folder renamed, copy uploaded."""
        for name in manifest.files:
            _flush(folder / name)
        target = self.path(manifest.kind, manifest.key)
        written = folder / NEW_MANIFEST
        written.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        _flush(written)
        written.rename(folder / MANIFEST)
        if not self.is_local:  # first: what is whole here must be there, or other machines would never find it
            self._upload(folder, manifest)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.remove(manifest.kind, manifest.key)
        folder.rename(target)
        _flush(target.parent)

    def remove(self, kind: str, key: str) -> None:
        """Remove an artefact: it stops existing before its files go."""
        folder = self.path(kind, key)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def check_writable(self, needed: int = 0) -> None:
        """Raise UserError unless this machine's part of the store takes a file and has `needed` bytes free."""
        folder = self._artefacts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                "store",
                str(folder),
                f"cannot be written ({error.strerror})",
                mend="Free space, mend the permissions, or set CARTWRIGHT_HOME",
            ) from None
        free = shutil.disk_usage(folder).free
        if free < needed:
            problem = f"has {free / 1e9:.1f} GB free, and the run may need {needed / 1e9:.1f} GB"
            mend = "Free space, make fewer formats, or set CARTWRIGHT_HOME to a larger disk"
            raise UserError("store", str(folder), problem, mend=mend)

    # Notes between machines --------------------------------------------------------------------------------------

    def write_note(self, name: str, text: str) -> None:
        """Leave a small text for another machine that uses the same store."""
        path = str(PurePosixPath(self.root) / name)
        self.fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
        if not self.is_local:
            self.fs.pipe_file(path, text.encode())
            return
        new = Path(f"{path}.{os.getpid()}.new")  # nobody reads half of it
        new.write_text(text, encoding="utf-8")
        new.replace(path)

    def read_note(self, name: str) -> str:
        """What `write_note` left.

        Raises:
            FileNotFoundError: nothing of this name.
            ValueError: it is too large, or not UTF-8.
        """
        with self.fs.open(str(PurePosixPath(self.root) / name), "rb") as file:
            data = file.read(LARGEST_NOTE + 1)
        if len(data) > LARGEST_NOTE:
            raise ValueError(f"has more than {LARGEST_NOTE:,} bytes")
        return str(data.decode())

    # Remote storage ----------------------------------------------------------------------------------------------

    def _remote(self, kind: str, key: str, name: str) -> str:
        return str(PurePosixPath(self.root) / kind / key / name)

    def _upload(self, folder: Path, manifest: Manifest) -> None:
        for name in [*manifest.files, MANIFEST]:  # the manifest last: until then nobody sees the artefact
            self.fs.makedirs(str(PurePosixPath(self._remote(manifest.kind, manifest.key, name)).parent), exist_ok=True)
            self.fs.put_file(str(folder / name), self._remote(manifest.kind, manifest.key, name))

    def _download(self, kind: str, key: str) -> str | None:
        """Copy an artefact, if there is one, and say what is wrong with it there. Nothing is fetched that its manifest does not name,
        and of each file as much as it says."""
        there = self._remote(kind, key, MANIFEST)
        if not self.fs.exists(there):
            return None
        partial, target = self.partial(kind, key), self.path(kind, key)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        size = self.fs.size(there)
        if size is not None and size > LARGEST_NOTE:
            return f"{there} has {size} bytes"
        self.fs.get_file(there, str(partial / NEW_MANIFEST))
        try:
            manifest = read_manifest(partial / NEW_MANIFEST)
        except ValueError as error:
            return f"{there} cannot be read ({_reason(error)})"
        for name, entry in manifest.files.items():
            source = self._remote(kind, key, name)
            try:
                size = self.fs.size(source)
                if size is not None and size != entry.size:
                    return f"{source} has {size} bytes instead of {entry.size}"
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(source, str(partial / name))
            except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
                return f"{source} is missing"
        (partial / NEW_MANIFEST).rename(partial / MANIFEST)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.remove(kind, key)
        partial.rename(target)
        return None


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


def _reason(error: Exception) -> str:
    return f"{error.error_count()} problems" if isinstance(error, ValidationError) else str(error)


def _own_manifest(folder: Path, kind: str, key: str) -> tuple[Manifest | None, str | None]:
    """The manifest of an artefact, or what is wrong with it; neither if there is no folder."""
    path = folder / MANIFEST
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return None, f"{folder} has no {MANIFEST}" if folder.exists() else None
    except (ValueError, IsADirectoryError) as error:
        return None, f"{path} cannot be read ({_reason(error)})"
    if (manifest.kind, manifest.key) != (kind, key):
        return None, f"{path} belongs to {manifest.kind} {manifest.key}"
    if not manifest.is_intact:
        return None, f"{path} has been changed since it was made"
    return manifest, None


def damage_of(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with an artefact's files, or None if they are what its manifest says."""
    inside = folder.resolve()
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if not path.resolve().is_relative_to(inside):
            return f"{path} is a link to a file elsewhere"
        if path.stat().st_size != entry.size:
            return f"{path} has {path.stat().st_size} bytes instead of {entry.size}"
    for name, entry in manifest.files.items():
        if sha256_file(folder / name) != entry.sha256:
            return f"{folder / name} has been changed since it was made"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
