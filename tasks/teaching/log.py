"""Every answer that was paid for, in one append-only file: a resumed or repeated run never buys the same one twice."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import Field, TypeAdapter

from tasks.core.manifests import checksum


@dataclass(frozen=True)
class Answer:
    """What a model behind an API said to one request, and what it cost. `usd` is None where the model's price is unknown.

    `problem` says why there is no text and will be none: a refusal took no tokens.
    """

    text: str
    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)]
    usd: Annotated[float, Field(ge=0)] | None
    seconds: float
    problem: str = ""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


_ANSWER = TypeAdapter(Answer)
_FIELDS = {field.name for field in fields(Answer)}


class AnswerLog:
    """The log, open for as long as a model is asked. Threads may add to it; a second process waits until it is closed.

    Args:
        wanted: the requests of this run, by hash; answers to others stay in the file and are not held in memory.
    """

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        self.path, self._wanted = path, frozenset(wanted)
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._process_lock = FileLock(path.with_suffix(".lock"))  # freed by the kernel when its holder dies

    def __enter__(self) -> AnswerLog:
        self._process_lock.acquire()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # the last line was torn by a kill or a full disk: what follows begins a new one
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                self._read(line)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._process_lock.release()

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            if entry["hash"] in self._wanted and entry.pop("sha256", None) in (None, checksum(entry)):  # earlier versions wrote none
                self._answers[entry["hash"]] = _ANSWER.validate_python({name: entry[name] for name in _FIELDS & entry.keys()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # torn or changed: that answer is bought again
            return

    def forget(self) -> None:
        """Take the answers to this run's requests from the disk, and the file with the last of them. The last thing to do with a log."""
        lines = self.path.read_bytes().split(b"\n")
        left = [line + b"\n" for line in lines if (request := _request_of(line)) and request not in self._wanted]
        if left:
            new = self.path.with_suffix(".new")  # others' answers cost money: a kill meanwhile must not lose them
            new.write_bytes(b"".join(left))
            new.replace(self.path)
        else:
            self.path.unlink()
            self.path.with_suffix(".lock").unlink()

    def get(self, request: str) -> Answer | None:
        return self._answers.get(request)

    def add(self, request: str, answer: Answer, about: dict[str, Any]) -> None:
        """Write one answer and flush it to the disk before returning.

        Args:
            about: what else the line says, for people: the request itself.

        Raises:
            OSError: the disk is full.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"hash": request, "time": now, **about, **asdict(answer)}
        line = json.dumps({**entry, "sha256": checksum(entry)}, ensure_ascii=False) + "\n"
        with self._lock:
            data = line.encode()
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
            self._answers[request] = answer


def _request_of(line: bytes) -> str | None:
    """The request that a line answers; None of a torn one, whose answer nobody can use."""
    try:
        return str(json.loads(line)["hash"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
