"""The plots of the data card: what share of each split is in which language, intent, noise and origin, and how long texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tasks.data_card import BIN
from tasks.plot_files import Plot
from tasks.plot_style import FORMATS, GRID, INK, LEGEND, PAPER, new_figure, plain, save, short

COLOURS = [colour for colour, _ in FORMATS.values()]  # told apart with every common colour vision deficiency
DASHES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")


def draw_data_plots(card: Mapping[str, Any]) -> list[Plot]:
    """Draw a card as `DataCard.write` wrote it."""
    shares = "Share of the rows of a split, %; brighter is more within a panel."
    return [
        save("data_contents", shares, _panels("Rows by intent and language, %", card, ("intents", "languages"))),
        save(
            "data_texts",
            f"{shares} A row may have several kinds of noise. Below: how long texts are.",
            _panels("Rows by noise, origin and length of text, %", card, ("noise", "origins"), lengths=True),
        ),
    ]


def _panels(title: str, card: Mapping[str, Any], names: Sequence[str], lengths: bool = False) -> Figure:
    labels = {name: sorted({label for found in card[name].values() for label in found}) for name in names}
    heights = [len(found) + 0.5 for found in labels.values()] + ([6.0] if lengths else [])
    figure, first = new_figure("", 0.9 + 0.26 * sum(heights))
    first.remove()
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=False):
        _heatmap(panel, card, name, labels[name], show_splits=name == names[0])
    if lengths:
        _lengths(panels[-1], figure, card)
    panels[0].set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=24)
    return figure


def _heatmap(axes: Axes, card: Mapping[str, Any], name: str, labels: Sequence[str], show_splits: bool) -> None:
    splits = list(card["counts"])
    counts = [[card[name].get(split, {}).get(label, 0) for split in splits] for label in labels]
    values = 100 * np.array(counts, dtype=float) / np.array([max(1, card["counts"][split]) for split in splits])
    plain(axes)
    top = 1.3 * values.max(initial=1)  # less than the whole scale, so that equal shares are not all glaring
    axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=top, edgecolors=PAPER, linewidth=1.5)
    for (row, column), value in np.ndenumerate(values):
        colour = "#ffffff" if value < top / 2 else "#000000"
        axes.text(column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks([at + 0.5 for at in range(len(labels))], [short(label) for label in labels])
    axes.set_xticks([at + 0.5 for at in range(len(splits))] if show_splits else [], splits if show_splits else [])
    axes.invert_yaxis()
    axes.xaxis.tick_top()


def _lengths(axes: Axes, figure: Figure, card: Mapping[str, Any]) -> None:
    plain(axes)
    for (split, bins), colour, dashes in zip(card["length_bins"].items(), COLOURS, DASHES, strict=False):
        starts = np.arange(0, max(map(int, bins)) + BIN, BIN)
        shares = [100 * bins.get(str(start), 0) / card["counts"][split] for start in starts]
        axes.stairs(shares, np.append(starts, starts[-1] + BIN), color=colour, linestyle=dashes, linewidth=1.4)
    handles = [Line2D([], [], color=c, linestyle=d, label=s) for s, c, d in zip(card["length_bins"], COLOURS, DASHES, strict=False)]
    axes.set(xlabel="Length of a text, characters", ylabel="% of the split", xlim=(0, None), ylim=(0, None))
    axes.grid(True, color=GRID, linewidth=0.7)
    figure.legend(handles=handles, **LEGEND)
