"""Drawn plots as files, which need no matplotlib to be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

CAPTIONS = "plots.json"


class Plot(NamedTuple):
    """One drawn plot: `name` is the PNG's file name without its ending, `caption` says how to read it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def write_plots(plots: Iterable[Plot], folder: Path) -> None:
    """Each plot as PNG and SVG, and what they are called in `plots.json`."""
    captions = {}
    for plot in plots:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
        (folder / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        captions[plot.name] = {"title": plot.title, "caption": plot.caption}
    (folder / CAPTIONS).write_text(json.dumps(captions, indent=1), encoding="utf-8")


def read_plots(folder: Path) -> list[Plot]:
    """What `write_plots` left.

    Raises:
        ValueError: a name that `write_plots` would not give, which might lead out of a folder.
    """
    captions = json.loads((folder / CAPTIONS).read_text(encoding="utf-8"))
    if strange := [name for name in captions if not re.fullmatch(r"\w+", name)]:
        raise ValueError(f"{folder / CAPTIONS} names {strange[0]!r}")
    return [
        Plot(name, words["title"], words["caption"], (folder / f"{name}.png").read_bytes(), (folder / f"{name}.svg").read_text("utf-8"))
        for name, words in captions.items()
    ]
