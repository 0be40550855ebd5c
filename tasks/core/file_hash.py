"""SHA-256 of files. Looking through a finished run's artefacts is seconds of one core, which may pass while something else is waited for."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

AT_ONCE = 8_000_000  # bytes; for so long Python's lock is free for others
# A file that was written to so recently may be written to again within the resolution of its times, and look untouched.
SETTLED_NS = 2_000_000_000

_Identity = tuple[int, int, int, int, int]
_read: dict[_Identity, Future[str]] = {}  # what this process has read, or is reading
_lock = threading.Lock()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content. What this process has read once, and nothing has been done to since, is not read again."""
    with path.open("rb", buffering=0) as file:
        identity = _identity(os.fstat(file.fileno()))
        if not _is_settled(identity):
            return _digest(file)
        with _lock:
            mine = identity not in _read
            reading = _read.setdefault(identity, Future())
        if not mine:
            return reading.result()
        try:
            digest = _digest(file)
        except BaseException as error:
            _forget(identity)
            reading.set_exception(error)
            raise
        if _identity(os.fstat(file.fileno())) != identity:
            _forget(identity)
        reading.set_result(digest)
        return digest


def read_ahead(readers: Iterable[Callable[[], object]]) -> None:
    """Let a thread read what is about to be asked for; what it cannot read is told to whoever asks."""

    def read() -> None:
        for reader in readers:
            with contextlib.suppress(Exception):
                reader()

    threading.Thread(target=read, name="read-ahead", daemon=True).start()


def _digest(file: io.FileIO) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(AT_ONCE))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def _identity(stat: os.stat_result) -> _Identity:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_settled(identity: _Identity) -> bool:
    return time.time_ns() - identity[-1] > SETTLED_NS


def _forget(identity: _Identity) -> None:
    with _lock:
        _read.pop(identity, None)
