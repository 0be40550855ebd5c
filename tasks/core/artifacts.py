"""The content-addressed store. An artefact exists only when its manifest does: written last, then one atomic rename.

Storage is an fsspec URI: `file://` (used in place), or a remote such as `s3://`, whose artefacts are copied to and from
a local folder. A failure of the storage raises; it is never taken for a missing artefact.

Locks are of one machine. Of two machines that make the same artefact at once, the first to write its manifest to a remote store has
made it, and the other takes that one. Files lie there below the digest of all of them, so that no artefact has files of two.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import fsspec
from filelock import FileLock

from tasks.core.file_hash import read_ahead
from tasks.core.manifests import (
    CHECKPOINTS,
    LARGEST_NOTE,
    MANIFEST,
    NEW_MANIFEST,
    Manifest,
    damage_of,
    digest_of,
    own_manifest,
    read_manifest,
    reason_of,
)
from tasks.core.settings import has_password, shown_uri
from tasks.domain.errors import UserError

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # no folders there; to make one would make a bucket of a mistyped name


class Store:
    """A folder of artefacts, `<kind>/<key>/`, at an fsspec URI.

    Args:
        uri: where artefacts live and other machines find them.
        local: a folder of this machine for work in progress and, if `uri` is remote, for copies.
    """

    def __init__(self, uri: str, local: Path) -> None:
        if has_password(uri):
            mend = "Give credentials by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise UserError("CARTWRIGHT_STORE", shown_uri(uri), "must not hold a password: the address is written into records", mend=mend)
        self.uri = uri
        self._scheme = urlsplit(uri).scheme
        self.is_local = self._scheme in ("", "file")
        options = {} if self.is_local else {"use_listings_cache": False}  # others write to it, too
        try:
            self.fs, root = fsspec.core.url_to_fs(uri, **options)
        except (ImportError, ValueError) as error:  # a package for it is missing, or nobody knows it
            mend = "For s3:// there is `pip install 'cartwright[s3]'`"
            raise UserError("CARTWRIGHT_STORE", uri, f"cannot be used ({error})", mend=mend) from None
        self.root = unquote(urlsplit(uri).path) if self.is_local else root
        self._artefacts = Path(self.root) if self.is_local else local / "copies"
        self._local = local
        self._ahead = threading.Event()

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
        found, damage = own_manifest(folder, manifest.kind, manifest.key)
        if not self.is_local and (not found or found.digest != manifest.digest):
            self.look_up(manifest.kind, manifest.key)
            found, damage = own_manifest(folder, manifest.kind, manifest.key)
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
        """Look an artefact up and verify every file of it. What is in a remote store replaces another one of the same key here, so the
        artefact's lock is held; see `look_up`.

        Returns:
            (manifest, None) if it is whole, (None, None) if there is none, (None, why) if it is damaged.
        """
        here, damage = self._find_here(kind, key)
        if self.is_local or (here and not self._replaced_there(here)):
            return here, damage
        there, damage_there = self._download(kind, key)
        return (there, None) if there else (here, None) if here else (None, damage_there or damage)

    def look_up(self, kind: str, key: str) -> tuple[Manifest | None, str | None]:
        """`find`, for whoever does not hold the artefact's lock: one at a time copies it from a remote store, each in the same place."""
        with nullcontext() if self.is_local else self.lock(kind, key):
            return self.find(kind, key)

    def read_ahead(self, artefacts: Iterable[tuple[str, str]]) -> None:
        """Let a thread read artefacts, by kind and key, that are probably going to be looked up, until something has to be made."""
        self._ahead = read_ahead(path for kind, key in artefacts for path in self._files_of(kind, key))

    def stop_reading_ahead(self) -> None:
        """Leave the machine to what is being made or measured."""
        self._ahead.set()

    def _files_of(self, kind: str, key: str) -> list[Path]:
        folder = self.path(kind, key)
        try:
            manifest, _ = own_manifest(folder, kind, key)
        except OSError:  # is told to whoever asks
            return []
        return [folder / name for name in manifest.files] if manifest else []

    def _find_here(self, kind: str, key: str) -> tuple[Manifest | None, str | None]:
        folder = self.path(kind, key)
        manifest, damage = own_manifest(folder, kind, key)
        if not manifest:
            return None, damage
        damage = damage_of(folder, manifest)
        return (None, damage) if damage else (manifest, None)

    def commit(self, folder: Path, manifest: Manifest) -> Manifest:
        """Turn a finished folder into an artefact: manifest written and flushed, copy uploaded, folder renamed.

        Returns:
            The artefact there is now: what another machine made of the same key meanwhile, if it was first.
        """
        for name in manifest.files:
            _flush(folder / name)
        target = self.path(manifest.kind, manifest.key)
        written = folder / NEW_MANIFEST
        written.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        _flush(written)
        written.rename(folder / MANIFEST)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # not before nothing can be lost with them
        if not self.is_local:  # first: what is whole here must be there, or other machines would never find it
            first = self._download(manifest.kind, manifest.key)[0] or self._upload(folder, manifest)
            if first:
                shutil.rmtree(folder)
                return first
        target.parent.mkdir(parents=True, exist_ok=True)
        self.remove(manifest.kind, manifest.key)
        folder.rename(target)
        _flush(target.parent)
        return manifest

    def finished(self, kind: str, key: str) -> Manifest | None:
        """What was made and described whole, and then not put in its place: a full disk, a storage that did not answer, a kill. It is now."""
        folder = self.partial(kind, key)
        manifest, _ = own_manifest(folder, kind, key)
        return self.commit(folder, manifest) if manifest and not damage_of(folder, manifest) else None

    def remove(self, kind: str, key: str) -> None:
        """Remove an artefact: it stops existing before its files go."""
        folder = self.path(kind, key)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def check_writable(self, needed: int = 0) -> None:
        """Raise UserError unless the store takes a file, this machine's part of it too, and that has `needed` bytes free."""
        if not self.is_local:
            self._check_remote()
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

    def _check_remote(self) -> None:
        probe = f"notes/probe-{socket.gethostname()}-{os.getpid()}"
        try:
            self.write_note(probe, probe)
            self.fs.rm_file(str(PurePosixPath(self.root) / probe))
        except Exception as error:  # each kind of storage has errors of its own
            mend = (
                "See that the address is right and the storage is there, and that the credentials (AWS_ACCESS_KEY_ID and others) may write"
            )
            raise UserError("CARTWRIGHT_STORE", self.uri, f"cannot be written ({type(error).__name__}: {error})", mend=mend) from None

    # Notes between machines --------------------------------------------------------------------------------------

    def write_note(self, name: str, text: str) -> None:
        """Leave a small text for another machine that uses the same store."""
        path = str(PurePosixPath(self.root) / name)
        self._make_folder_of(path)
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

    def _make_folder_of(self, path: str) -> None:
        if self._scheme not in OBJECT_STORES:
            self.fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)

    def _remote(self, kind: str, key: str, name: str) -> str:
        return str(PurePosixPath(self.root) / kind / key / name)

    def _replaced_there(self, here: Manifest) -> bool:
        """Whether another machine made the same artefact anew, with other files."""
        try:
            there = Manifest.model_validate_json(self.read_note(f"{here.kind}/{here.key}/{MANIFEST}"))
        except (FileNotFoundError, ValueError):  # what is here is whole
            return False
        return there.digest != here.digest

    def _upload(self, folder: Path, manifest: Manifest) -> Manifest | None:
        """Copy an artefact there, the manifest last: until then nobody sees it; or give what another machine was first with."""
        for name in manifest.files:
            self._put(folder / name, self._remote_file(manifest, name))
        there, written = self._remote(manifest.kind, manifest.key, MANIFEST), (folder / MANIFEST).read_bytes()
        self._make_folder_of(there)
        try:
            self.fs.pipe_file(there, written, mode="create")
        except Exception:  # one is there; or the storage cannot write only what is new, and the last one is first
            if first := self._download(manifest.kind, manifest.key)[0]:
                return first
            self.fs.pipe_file(there, written)
        return None

    def _put(self, file: Path, there: str) -> None:
        self._make_folder_of(there)
        self.fs.put_file(str(file), there)

    def _remote_file(self, manifest: Manifest, name: str) -> str:
        return self._remote(manifest.kind, manifest.key, f"{digest_of(manifest.files)}/{name}")

    def _download(self, kind: str, key: str) -> tuple[Manifest | None, str | None]:
        """Copy an artefact, if there is a whole one, or say what is wrong with it there. Nothing is fetched that its manifest does not
        name, and of each file as much as it says."""
        there = self._remote(kind, key, MANIFEST)
        if not self.fs.exists(there):
            return None, None
        partial = self.partial(kind, f"{key}-copy")  # not where a stage would go on from its checkpoints
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            return self._copy(there, partial, kind, key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _copy(self, there: str, partial: Path, kind: str, key: str) -> tuple[Manifest | None, str | None]:
        size = self.fs.size(there)
        if size is not None and size > LARGEST_NOTE:
            return None, f"{there} has {size} bytes"
        self.fs.get_file(there, str(partial / NEW_MANIFEST))
        try:
            manifest = read_manifest(partial / NEW_MANIFEST)
        except ValueError as error:
            return None, f"{there} cannot be read ({reason_of(error)})"
        for name, entry in manifest.files.items():
            source = self._remote_file(manifest, name)
            try:
                size = self.fs.size(source)
                if size is not None and size != entry.size:
                    return None, f"{source} has {size} bytes instead of {entry.size}"
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(source, str(partial / name))
            except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
                return None, f"{source} is missing"
        (partial / NEW_MANIFEST).rename(partial / MANIFEST)
        found, damage = own_manifest(partial, kind, key)
        damage = damage_of(partial, found) if found else damage
        if damage:
            return None, damage.replace(str(partial), str(PurePosixPath(there).parent))
        target = self.path(kind, key)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.remove(kind, key)
        partial.rename(target)
        return found, None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
