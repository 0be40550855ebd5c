"""Customer texts from wherever they lie: JSONL at any fsspec URI, read a line at a time, so that memory does not grow with them."""

from __future__ import annotations

import hashlib
import io
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import fsspec

from tasks.core.rows import keep_sample
from tasks.domain.errors import UserError
from tasks.domain.labelled import has_half_character, parse_json

LONGEST_LINE = 1_000_000  # bytes; what has no end of line within them is no line of JSONL
MOST_BYTES = 20_000_000_000  # unpacked; what would take hours to read is a mistake, or a small file that unpacks to a huge one
MOST_BAD = 10_000  # bad lines that are kept; all are counted
SHOWN = 3  # bad lines named in an error
MOST_MEMORY = 100_000_000  # bytes to unpack an .xz with; `xz -9` needs 68,000,000. Other ways of packing have bounds of their own
PART = 65_536  # bytes of an .xz that are read at a time
ENDINGS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # and .xz, see `_Unpacked`
MEND = 'Give JSONL in UTF-8, such as {"text": "where is my order?"} a line'


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, without what it says: it may be personal."""

    file: str
    line: int
    problem: str


@dataclass
class RecentTexts:
    """What was read: digest of all bytes, how many texts there were, a random sample of them, and the lines that were none, as far
    as `MOST_BAD`; `unusable` counts all of those by reason."""

    sha256: str = ""
    files: int = 0
    usable: int = 0
    texts: list[str] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)

    def problems(self) -> dict[str, int]:
        """Counts of unusable lines by reason, most frequent first."""
        return dict(self.unusable.most_common())

    def add_bad(self, line: BadLine) -> None:
        """Count a line that cannot be used, and keep it while there are few."""
        self.unusable[line.problem.partition(" (")[0]] += 1
        if len(self.bad) < MOST_BAD:
            self.bad.append(line)


def read_texts(uri: str, most: int, seed: int = 0) -> RecentTexts:
    """The texts of JSONL files, each line with a `text`; other fields are not looked at, empty lines are none.

    Args:
        uri: any fsspec URI or path; `*` stands for any part of a name, files that end in .gz, .bz2, .xz or .zst are unpacked.
        most: texts to keep, a random sample of them all.

    Raises:
        UserError: there is no such file, it cannot be read, one has more than `MOST_BYTES`, one needs more than
            `MOST_MEMORY` to be unpacked, or no line of it can be used.
    """
    found, digest, draw = RecentTexts(), hashlib.sha256(), Random(f"{seed}/texts")
    for name, opened in _files(uri):
        found.files += 1
        digest.update(b"\0file\0")  # two files are not one with the same lines
        for number, line in enumerate(_lines(uri, opened), 1):
            digest.update(line)
            text, problem = _text_of(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            if problem:
                found.add_bad(BadLine(name, number, problem))
            elif text:
                found.usable += 1
                keep_sample(found.texts, text, found.usable, most, draw)
    found.sha256 = digest.hexdigest()
    if not found.usable:
        first = "; ".join(f"line {bad.line} {bad.problem}" for bad in found.bad[:SHOWN]) or "it is empty"
        raise UserError("texts", shown(uri), f"has no usable line among {found.unusable.total()} ({first})", mend=MEND)
    return found


def shown(uri: str) -> str:
    """A URI as it may be written into reports: without what follows a `?`."""
    return re.sub(r"//[^/@]*@", "//***@", uri.partition("?")[0]) if "://" in uri else uri


def _files(uri: str) -> list[tuple[str, Any]]:
    """Name and opener of every file that a URI stands for, by name.

    Raises:
        UserError: none, or no storage of that kind.
    """
    if not uri:
        raise UserError("texts", uri, "names no file", mend="Give a path or an fsspec URI, such as s3://shop/chat/*.jsonl")
    # A chain such as simplecache::https://... has several addresses. Which words of a query are secret cannot be known: none is taken.
    try:
        parts = [urlsplit(part) for part in uri.split("::") if "://" in part]
    except ValueError as error:
        raise _unreadable(uri, error) from None
    if any(part.query or "@" in part.netloc for part in parts):
        mend = "It would be kept with the report: give it by the environment or by fsspec's own configuration"
        raise UserError("texts", shown(uri), "holds a user, a password or a query", mend=mend)
    try:
        system, path = fsspec.core.url_to_fs(uri)
        paths = sorted(system.glob(path)) if "*" in path else [path]
        folder = "*" not in path and system.isdir(path)
    except Exception as error:  # every storage has errors of its own
        raise _unreadable(uri, error) from None
    if not paths:
        raise UserError("texts", shown(uri), "matches no file", mend="Correct the pattern, or let the texts be written there first")
    if folder:
        raise UserError("texts", shown(uri), "is a folder", mend=f"Name the files in it: {shown(uri).rstrip('/')}/*.jsonl")
    return [(str(name), fsspec.core.OpenFile(system, name, "rb", ENDINGS.get(Path(name).suffix))) for name in paths]


def _lines(uri: str, opener: Any) -> Iterator[bytes]:
    """Lines of a file; of one that is too long, its beginning alone."""
    size, is_new = 0, True
    try:
        with opener as opened:
            # The files of some storages read whole lines only.
            file = io.BufferedReader(_Unpacked(opened) if opener.path.endswith(".xz") else opened)
            while part := file.readline(LONGEST_LINE):
                size += len(part)
                if size > MOST_BYTES:
                    mend = "Name files of recent texts alone"
                    raise UserError("texts", shown(uri), f"has a file of more than {MOST_BYTES:,} bytes", mend=mend)
                if is_new:
                    yield part
                is_new = part.endswith(b"\n")
    except UserError:
        raise
    except Exception as error:  # every storage, and every way of packing, has errors of its own
        raise _unreadable(uri, error) from None


class _Unpacked(io.RawIOBase):
    """What an .xz file holds. `lzma.LZMAFile` has no limit, and a header of a few bytes can ask for a dictionary of 4 GB."""

    def __init__(self, packed: Any) -> None:
        self._packed, self._left = packed, b""
        self._stream = lzma.LZMADecompressor(memlimit=MOST_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = b""
        while not part:
            if self._stream.eof:  # what is packed in several threads or appended to is one stream after another, with zeros between them
                left = self._stream.unused_data or self._packed.read(PART)
                while left and not left.strip(b"\0"):
                    left = self._packed.read(PART)
                self._left = left.lstrip(b"\0")
                if not self._left:
                    return 0
                self._stream = lzma.LZMADecompressor(memlimit=MOST_MEMORY)
            elif self._stream.needs_input and not self._left:
                self._left = self._packed.read(PART)
                if not self._left:
                    raise EOFError("the file ends before its end")
            part = self._stream.decompress(self._left, len(buffer))
            self._left = b""
        buffer[: len(part)] = part
        return len(part)


def _unreadable(uri: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError("texts", shown(uri), "does not exist", mend="Correct the address, or let the texts be written there first")
    if isinstance(error, ImportError):
        return UserError("texts", shown(uri), f"needs a library that is not installed ({error})", mend="Install it beside Cartwright")
    if isinstance(error, lzma.LZMAError) and "usage limit" in str(error):
        mend = "Pack it as `xz -9` does, or with less"
        return UserError("texts", shown(uri), f"has a file that needs more than {MOST_MEMORY:,} bytes of memory to be unpacked", mend=mend)
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError("texts", shown(uri), f"cannot be read ({reason[:200]})", mend="Mend the address or the permissions")


def _text_of(line: bytes) -> tuple[str, str | None]:
    """The text of a line, empty for an empty line, and why there is none."""
    if len(line) >= LONGEST_LINE:
        return "", f"is longer than {LONGEST_LINE} bytes"
    try:
        decoded = line.decode("utf-8").strip()
    except UnicodeDecodeError:
        return "", "is not UTF-8"
    if not decoded:
        return "", None
    row, problem = parse_json(decoded)
    if problem:
        return "", problem
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return "", "has no `text`"
    text = row["text"].strip()
    if has_half_character(text):
        return "", "has half a character"
    return (text, None) if text else ("", "has an empty `text`")
