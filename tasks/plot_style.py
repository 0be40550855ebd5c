"""How every plot looks, and how it is saved: as PNG bytes and as an SVG that follows the colours of the page."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.plot_files import Plot

INK, MUTED, GRID, PAPER = "#1b2330", "#5b6675", "#d9dee5", "#fefefe"
# Okabe and Ito's palette, told apart with every common colour vision deficiency; the markers repeat the colours.
FORMATS = {"hf": ("#0072b2", "o"), "gptq": ("#d55e00", "s"), "gguf": ("#009e73", "D"), "awq": ("#cc79a7", "^"),
           "api": ("#e69f00", "P")}  # fmt: skip
# The page declares these variables once for light and once for dark; only the PNG files keep the literal colours.
PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAPER: "--paper"}
PAGE_COLOURS |= {colour: f"--{name}" for name, (colour, _) in FORMATS.items()}
LEGEND: dict[str, Any] = {"loc": "outside lower center", "ncols": 6, "frameon": False, "fontsize": 9, "labelcolor": INK}


def new_figure(title: str, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, height_in), dpi=100, layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """No frame and no ticks; the grid behind what is drawn."""
    axes.set_facecolor(PAPER)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def short(label: object) -> str:
    text = " ".join(str(label).split())
    text = text if len(text) <= 24 else f"{text[:23]}…"
    return text.replace("$", r"\$")  # a bare pair of $ would be read as mathematics, and may fail


def save(name: str, caption: str, figure: Figure) -> Plot:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", backend="agg", dpi=160)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):  # the same report gives the same bytes
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Plot(name, figure.axes[0].get_title(loc="left"), caption, png.getvalue(), _for_page(svg.getvalue()))


def _for_page(svg: str) -> str:
    """An SVG file as an inline element: no prologue, comments, metadata or group ids, colours as page variables."""
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg)
