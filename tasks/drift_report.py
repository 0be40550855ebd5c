"""The pages of a drift check: HTML with plots, and Markdown for Prefect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.drift_columns import Column
from tasks.templating import fill

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tasks.plot_files import Plot

PAGE, TEXT = "drift.html", "drift.md"
HEADLINES = {
    "found": "Drift: recent texts are not what the champion was trained for",
    "none": "No drift: recent texts are like those of training",
    "inconclusive": "Inconclusive: too few texts",
}
SIDES = ("training", "recent")
LABELS_SHOWN = 12
Json = dict[str, Any]


def write_pages(folder: Path, found: Mapping[str, Any], columns: Sequence[Column]) -> None:
    """Write `drift.html` and `drift.md` of what a check found."""
    values = {"found": found, "headline": HEADLINES[found["verdict"]], "rows": rows_of(found)}
    plots = draw(columns) if columns else []
    (folder / PAGE).write_text(fill("drift.html.j2", values | {"plots": plots}), encoding="utf-8")
    (folder / TEXT).write_text(fill("drift.md.j2", values), encoding="utf-8")


def rows_of(found: Mapping[str, Any]) -> list[Json]:
    """The table of columns, as it is shown."""
    return [
        {
            "column": column["title"],
            "drift": {True: "drift", False: "no", None: "not compared"}[column["drift"]],
            "recent against training": column["words"],
            "difference": "" if column["distance"] is None else f"{column['distance']:.2f}",
            "allowed": f"{column['allowed']:.2f}",
            "p": "" if column["p"] is None else f"{column['p']:.2g}",
            "test": column["test"] or "",
        }
        for column in found["columns"]
    ]


def draw(columns: Sequence[Column]) -> list[Plot]:
    """One plot for each column that has values on both sides."""
    from tasks.plot_style import new_figure, save

    plots = []
    for column in columns:
        if not column.reference or not column.recent:
            continue
        figure, axes = new_figure(column.title, 2.9)
        caption = _curves(axes, column) if column.kind == "number" else _bars(axes, column)
        plots.append(save(f"drift_{column.name}", caption, figure))
    return plots


def _colours() -> dict[str, str]:
    from tasks.plot_style import FORMATS

    return {"training": FORMATS["hf"][0], "recent": FORMATS["gptq"][0]}


def _curves(axes: Axes, column: Column) -> str:
    """Cumulative shares; the largest vertical distance of the curves is the Kolmogorov-Smirnov distance."""
    import numpy as np

    from tasks.plot_style import GRID, LEGEND

    for side, values, dashes in zip(SIDES, (column.reference, column.recent), ("-", "--"), strict=True):
        ordered = np.sort(np.asarray(values, dtype=float))
        shares = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(ordered, shares, where="post", color=_colours()[side], linestyle=dashes, linewidth=1.6, label=side)
    axes.set(ylabel="% of texts at most", ylim=(0, 102))
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.figure.legend(**LEGEND)
    return "Share of texts with at most this value. Drift is how far the curves are apart, at their widest."


def _bars(axes: Axes, column: Column) -> str:
    import numpy as np

    from tasks.plot_style import GRID, LEGEND, short

    names = {True: "cannot be parsed", False: "can be parsed"} if column.kind == "share" else {}
    counts = [Counter(str(names.get(value, value)) for value in values) for values in (column.reference, column.recent)]
    labels = [label for label, _ in (counts[0] + counts[1]).most_common(LABELS_SHOWN)][::-1]
    axes.figure.set_figheight(1.3 + 0.32 * len(labels))  # type: ignore[union-attr]
    for at, (side, found) in enumerate(zip(SIDES, counts, strict=True)):
        places = np.arange(len(labels)) + (0.2 if at == 0 else -0.2)
        axes.barh(places, [100 * found[label] / found.total() for label in labels], 0.38, color=_colours()[side], label=side)
    axes.set_yticks(range(len(labels)), [short(label) for label in labels])
    axes.set(xlabel="% of texts", xlim=(0, None))
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.figure.legend(**LEGEND)
    return "Share of texts. Drift is the share that would have to change its label."
