"""Rows, one after the other: those of a JSONL file, and a random sample of as many as there may be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeVar

Row = TypeVar("Row")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def keep_sample(kept: list[Row], row: Row, met: int, most: int, draw: Random) -> None:
    """Let another row into a random sample of all that were met, or not (reservoir sampling, Vitter 1985, algorithm R).

    Args:
        kept: the sample so far, changed in place.
        met: how many rows there were, with this one.
        most: size of the sample.
    """
    place = len(kept) if len(kept) < most else draw.randrange(met)
    if place < most:
        kept[place : place + 1] = [row]
