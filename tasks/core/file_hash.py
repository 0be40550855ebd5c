"""SHA-256 of files. Looking through a finished run's artefacts is seconds of one core, which may pass while something else is waited for."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

AT_ONCE = 8_000_000  # bytes; for so long Python's lock is free for others
# A file that was written to so recently may be written to again within the resolution of its times, and look untouched.
SETTLED_NS = 2_000_000_000

_Identity = tuple[int, int, int, int, int]
_read: dict[_Identity, Future[str | None]] = {}  # what this process has read, or is reading; None of what it gave up
_lock = threading.Lock()


class Stopped(Exception):
    """Nobody wants to know any more."""


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    """Hexadecimal SHA-256 of a file's content. What this process has read once, and nothing has been done to since, is not read again.

    Args:
        stop: where it is set, reading ends early.

    Raises:
        OSError: the file cannot be read.
        Stopped: `stop` was set.
    """
    with path.open("rb", buffering=0) as file:
        identity = _identity(file)
        if time.time_ns() - identity[-1] <= SETTLED_NS:
            return _digest(file, identity, stop)
        while not (reading := _begin(identity)):
            other = _read.get(identity)
            if other and (found := other.result()):
                return found  # what another thread could not read is tried again here
        digest, untouched = None, False
        try:
            digest = _digest(file, identity, stop)
            untouched = _identity(file) == identity
            return digest
        finally:
            if not untouched:
                with _lock:
                    _read.pop(identity)
            reading.set_result(digest if untouched else None)


def read_ahead(paths: Iterable[Path]) -> threading.Event:
    """Let a thread read files that are about to be asked for; what it cannot read is told to whoever asks.

    Returns:
        What stops it.
    """
    stop = threading.Event()

    def read() -> None:
        for path in paths:
            if stop.is_set():
                break
            with contextlib.suppress(OSError, Stopped):
                sha256_file(path, stop)

    threading.Thread(target=read, name="read-ahead", daemon=True).start()
    return stop


def _begin(identity: _Identity) -> Future[str | None] | None:
    """What is to be told to those who ask while a file is read; None if somebody has read it, or is reading it."""
    with _lock:
        return None if identity in _read else _read.setdefault(identity, Future())


def _digest(file: io.FileIO, identity: _Identity, stop: threading.Event | None) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(AT_ONCE, identity[2] + 1)))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
        if stop and stop.is_set():
            raise Stopped
    return digest.hexdigest()


def _identity(file: io.FileIO) -> _Identity:
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
