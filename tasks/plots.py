"""The plots of a report, each one a small figure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from tasks.fidelity import UNUSABLE
from tasks.plot_files import Plot
from tasks.plot_style import FORMATS, GRID, INK, LEGEND, MUTED, PAPER, new_figure, save, short

RING: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.1}
LEADER = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
RADII = (10, 16, 24, 34, 46, 60, 76, 94, 114)  # points between a marker and its label; from the third on, with a line
OTHER = (MUTED, "X")  # colour and marker of a format that is none of ours
WINDOW = 0.25  # this far below the best exact match, a variant must not squeeze the useful ones into one line


class _Point(NamedTuple):
    label: str
    x: float
    y: float
    low: float
    high: float
    format: str
    gpu: bool
    contrast: bool
    pareto: bool
    recommended: bool
    sound: bool = True


def draw_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Draw every plot of a report (see `tasks/report.py`); one without any figure says "not measured"."""
    key = ("Bars: 95% interval. Line (on a GPU: dashed): none is better in both figures. Ring: Pareto front over all "
           "figures. Star: recommended. A triangle on the lower edge lies below the axis. A cross was found unusable.")  # fmt: skip
    at_a_time = ((report.get("recommendation") or {}).get("constraints") or {}).get("at_a_time") or 1
    speed, under_way = (
        ("performance.requests_s", "") if at_a_time == 1 else (f"performance.requests_s_by_load.{at_a_time}", f", {at_a_time} at a time")
    )
    return [
        save("accuracy_memory", f"Upper left is better. {key}",
              _scatter("Exact match against memory", report, "performance.rss_mb", "Memory (RSS), MB", -1)),
        save("accuracy_speed", f"Upper right is better. {key}",
              _scatter("Exact match against speed", report, speed, f"Requests per second{under_way}", 1)),
        save("latency", "Further left is better. Line: the median; box: half of the requests; whiskers: 5 to 95 of 100; dot: 99 of 100.",
              _latencies("Latency of one request, ms", report)),
        save("divergence", "Lower left is better: fewer bits, and token probabilities nearer to the 16-bit model's. A cross was found unusable.",
              _divergence("Divergence against bits", report)),
        save("size", "Shorter is better.", _bars("Size on disk, MB", report)),
        save("languages", "Brighter is better; all that lies far below the rest is equally dark; n/m: not measured.",
              _languages("Exact match by language, %", report)),
    ]  # fmt: skip


def figure_at(node: Any, path: str) -> float | None:
    """The number at a dotted `path` in nested mappings, or its "value" where an interval is stored; else None."""
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    value = node.get("value") if isinstance(node, Mapping) else node
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _scatter(title: str, report: Mapping[str, Any], path: str, xlabel: str, better: int) -> Figure:
    """Exact match against the figure at `path`, of which more (`better` 1) or less (-1) is better."""
    figure, axes = new_figure(title, 4.7)
    points = list(_points(report, path))
    if not points:
        return _not_measured(figure)
    top, floor = max(p.high for p in points), _floor([p.y for p in points])
    bottom = min(p.low for p in points if p.y >= floor)
    pad = max(0.06 * (top - bottom), 0.004)
    bottom -= 2.2 * pad  # room for labels, and for the triangles of what lies below
    edge = bottom + 0.5 * pad
    axes.set(xlabel=xlabel, ylabel="Exact match (test split)", ylim=(bottom, top + pad))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%" if 0 <= y <= 1 else ""))
    _scale_x(axes, [p.x for p in points])
    axes.grid(True, color=GRID, linewidth=0.7)
    fronts = [_front([p for p in points if p.gpu == gpu], better) for gpu in (False, True)]
    for front, dashes in zip(fronts, ("-", "--"), strict=True):
        axes.plot([p.x for p in front], [p.y for p in front], dashes, color=MUTED, linewidth=1.1, zorder=1)
    for point in points:
        _draw_point(axes, point, edge)
    _label_points(figure, points, fronts, edge, Line2D([], [], label="Pareto front", color=INK, linestyle="none", **RING))
    return figure


def _label_points(figure: Figure, points: Sequence[_Point], fronts: Sequence[list[_Point]], edge: float, *more: Line2D) -> None:
    """The legend, with `more` behind the formats, and each point's name."""
    used = [name for name in FORMATS if any(p.format == name for p in points)]
    handles = [Line2D([], [], color=FORMATS[n][0], marker=FORMATS[n][1], linestyle="none", label=n) for n in used]
    figure.legend(handles=[*handles, *more], **LEGEND)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed for this layout; another pass would move the axes
    _place_labels(figure, points, fronts, edge)


def _points(report: Mapping[str, Any], path: str) -> Iterator[_Point]:
    for variant in report.get("variants") or []:
        x, y = figure_at(variant, path), figure_at(variant, "quality.exact_match")
        low, high = (figure_at(variant, f"quality.exact_match.{end}") for end in ("low", "high"))
        if x and x > 0 and y is not None:
            yield _Point(_label(variant, report), x, y, y if low is None else low, y if high is None else high,
                         str(variant.get("format")), str(variant.get("device")).startswith(("cuda", "gpu")),
                         variant.get("role") in ("base", "baseline", "api"), variant.get("name") in (report.get("pareto") or []),
                         _is_recommended(variant, report), _is_sound(variant))  # fmt: skip


def _is_sound(variant: Mapping[str, Any]) -> bool:
    return (variant.get("fidelity") or {}).get("verdict") not in UNUSABLE


def _front(points: Sequence[_Point], better: int) -> list[_Point]:
    """The points no other point beats in both figures, by x. Base and API models are shown for contrast and take no part,
    nor does what was found unusable."""
    front: list[_Point] = []
    for point in sorted(points, key=lambda p: (-better * p.x, -p.y)):
        if point.sound and not point.contrast and (not front or point.y > front[-1].y):
            front.append(point)
    return front


def _floor(values: Sequence[float]) -> float:
    """The lowest value that counts: the least one within `WINDOW` of the best, unless hardly any is that good."""
    near = [value for value in values if value >= max(values) - WINDOW]
    return min(near) if len(near) >= 3 else min(values)


def _draw_point(axes: Axes, point: _Point, edge: float) -> None:
    colour, _ = FORMATS.get(point.format, OTHER)
    y, below = max(point.y, edge), point.y < edge
    if not below:
        around = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]  # an earlier version rounded beyond the point
        axes.errorbar([point.x], [point.y], yerr=around, fmt="none",
                      ecolor=colour, elinewidth=1, capsize=2, alpha=0.7)  # fmt: skip
    if point.pareto:
        axes.plot([point.x], [y], color=INK, **RING)
    _draw_marker(axes, point, y, "v" if below else "")


def _draw_marker(axes: Axes, point: _Point, y: float, instead: str = "") -> None:
    """The marker of the point's format, or another; a cross where it was found unusable."""
    colour, marker = FORMATS.get(point.format, OTHER)
    shape, edge_colour = (instead or marker, PAPER) if point.sound else ("x", colour)
    axes.plot([point.x], [y], shape, color=colour, markersize=7, markeredgecolor=edge_colour, zorder=3)


def _place_labels(figure: Figure, points: Sequence[_Point], fronts: Sequence[list[_Point]], edge: float) -> None:
    """Put each label where it covers no label, marker, interval or line, as near to its point as that allows."""
    axes, scale = figure.axes[0], figure.dpi / 72
    frame, to_pixels = axes.get_window_extent(), axes.transData.transform
    ends = [((p.x, p.y), (q.x, q.y)) for front in fronts for p, q in pairwise(front)]
    ends += [((p.x, p.low), (p.x, p.high)) for p in points if p.y >= edge]
    lines: Any = np.vstack([np.linspace(to_pixels(a), to_pixels(b), 40) for a, b in ends] or [np.empty((0, 2))])
    centres, leaders = to_pixels([(p.x, max(p.y, edge)) for p in points]), lines[:0]
    solid = [Bbox([centre, centre]).padded(7 * scale) for centre in centres]
    for point, centre in sorted(zip(points, centres, strict=True), key=lambda pair: -pair[0].recommended):
        words = point.label if point.y >= edge else f"{point.label} {point.y:.0%}"
        font = FontProperties(size=8.5, weight="bold" if point.recommended else "normal")
        size = Text(0, 0, words, figure=figure, fontproperties=font).get_window_extent().size
        crowded = (np.hypot(*(centres - centre).T) < 12 * scale).sum() > 1  # then only a line says whose label it is
        best: tuple[float, Any, int, Bbox, Any] = (math.inf, centre, 0, frame, leaders)
        for radius, angle in product(RADII[2:] if crowded else RADII, np.radians(range(0, 360, 15))):
            offset, side = radius * np.array([np.cos(angle), np.sin(angle)]), round(np.cos(angle))
            corner = centre + scale * offset - size * np.array([0.5 - 0.5 * side, 0.5])
            box = Bbox([corner, corner + size])
            leader = np.linspace(centre + offset * 10 * scale / radius, centre + scale * offset, 20 * (radius > 16))
            cost = radius + 300 * box.count_overlaps(solid) + 30 * min(_hits(box, lines), 3) + 60 * _hits(box, leaders)
            cost += 40 * min(sum(_hits(other, leader) for other in solid), 3)
            cost += 40 * _touches(leader, leaders) + 3 * _touches(leader, lines)
            cost += 900 * (_hits(frame, np.array([box.min, box.max])) < 2)
            best = min(best, (cost, offset, side, box, leader), key=lambda choice: choice[0])
        _, offset, side, box, leader = best
        solid.append(box.padded(4))
        leaders = np.vstack([leaders, leader])
        axes.annotate(words, (point.x, max(point.y, edge)), offset, textcoords="offset points", va="center", zorder=4,
                      ha=("center", "left", "right")[side], color=INK, fontproperties=font,
                      arrowprops=LEADER | {"relpos": (0.5 - 0.5 * side, 0.5)} if len(leader) else None)  # fmt: skip


def _touches(line: Any, pixels: Any) -> int:
    """How many pixels of a line, of shape (n, 2), come within 3 of any other of `pixels`."""
    return sum(bool(np.hypot(*(pixels - step).T).min(initial=np.inf) < 3) for step in line)


def _hits(box: Bbox, pixels: Any) -> int:
    """How many of the `pixels`, an array of shape (n, 2), lie in the box."""
    return int(((pixels >= box.min) & (pixels <= box.max)).all(axis=1).sum())


def _bars(title: str, report: Mapping[str, Any]) -> Figure:
    """Horizontal bars of the size on disk, one for each variant."""
    variants = list(reversed(report.get("variants") or []))
    figure, axes = new_figure(title, 1.2 + 0.42 * max(len(variants), 4))
    values = np.array([figure_at(variant, "size_mb") for variant in variants], dtype=float)
    if np.isnan(values).all():
        return _not_measured(figure)
    for y, (variant, value) in enumerate(zip(variants, values, strict=True)):
        axes.barh([y], [value], 0.66, color=FORMATS.get(variant.get("format"), (MUTED,))[0])
        words = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        axes.text(np.nan_to_num(value), y, f" {_absent(variant) if math.isnan(value) else words}", va="center", fontsize=8, color=INK)
    axes.set(xlim=(0, 1.14 * np.nanmax(values) or 1))
    _name_rows(axes, variants, report)
    return figure


def _latencies(title: str, report: Mapping[str, Any]) -> Figure:
    """Horizontal boxes of the latency, one for each variant, on a logarithmic axis where they lie far apart."""
    variants = list(reversed(report.get("variants") or []))
    figure, axes = new_figure(title, 1.2 + 0.42 * max(len(variants), 4))
    found = [
        {q: figure_at(variant, f"performance.latency_ms.{q}") for q in ("p5", "p25", "p50", "p75", "p95", "p99")} for variant in variants
    ]
    known = [value for quantiles in found for value in quantiles.values() if value]
    if not known:
        return _not_measured(figure)
    for y, (variant, quantiles) in enumerate(zip(variants, found, strict=True)):
        colour, median = FORMATS.get(variant.get("format"), (MUTED,))[0], quantiles["p50"]
        if median is None:
            axes.text(min(known), y, f" {_absent(variant)}", va="center", fontsize=8, color=INK)
            continue
        low, q1, q3, high = (quantiles[q] if quantiles[q] is not None else median for q in ("p5", "p25", "p75", "p95"))
        box = {"med": median, "q1": q1, "q3": q3, "whislo": low, "whishi": high, "fliers": [quantiles["p99"] or high]}
        line = {"color": colour, "linewidth": 1.2}
        axes.bxp([box], positions=[y], widths=0.5, orientation="horizontal", manage_ticks=False, patch_artist=True,
                 boxprops={"facecolor": colour, "edgecolor": colour, "alpha": 0.45}, whiskerprops=line, capprops=line,
                 medianprops={"color": INK, "linewidth": 1.6},
                 flierprops={"marker": "o", "markersize": 3, "markerfacecolor": colour, "markeredgecolor": colour})  # fmt: skip
    _scale_x(axes, known)
    _name_rows(axes, variants, report)
    return figure


def _absent(variant: Mapping[str, Any]) -> str:
    return "failed" if variant.get("error") else "not measured"


def _name_rows(axes: Axes, variants: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    axes.set_ylim(-0.6, len(variants) - 0.4)
    axes.set_yticks(range(len(variants)), [_label(variant, report) for variant in variants])
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)


def _divergence(title: str, report: Mapping[str, Any]) -> Figure:
    """Mean divergence from the 16-bit model against true bits per weight, of every quantized variant."""
    figure, axes = new_figure(title, 4.7)
    points = []
    for variant in report.get("variants") or []:
        x, y = figure_at(variant, "bits"), figure_at(variant, "fidelity.mean_kld")
        if x and y is not None:
            y = max(y, 1e-7)  # of a format that changes nothing it is zero, which a logarithmic axis has no place for
            points.append(_Point(_label(variant, report), x, y, y, y, str(variant.get("format")), False, False, False,
                                 _is_recommended(variant, report), _is_sound(variant)))  # fmt: skip
            _draw_marker(axes, points[-1], y)
    if not points:
        return _not_measured(figure)
    axes.set(xlabel="Bits per weight", ylabel="Mean KL divergence, nats", yscale="log")
    _scale_x(axes, [p.x for p in points])
    axes.set_ylim(min(p.y for p in points) / 2.5, max(p.y for p in points) * 2.5)
    axes.grid(True, color=GRID, linewidth=0.7)
    _label_points(figure, points, [], 0.0)
    return figure


def _languages(title: str, report: Mapping[str, Any]) -> Figure:
    variants = report.get("variants") or []
    figure, axes = new_figure(title, 1.2 + 0.4 * max(len(variants), 4))
    scores = [(v.get("quality") or {}).get("by_language") or {} for v in variants]
    languages = list(dict.fromkeys(language for score in scores for language in score if language[-7:] != "_reason"))
    values = np.array([[figure_at({"x": score.get(k)}, "x") for k in languages] for score in scores], dtype=float)
    if np.isnan(values).all():
        return _not_measured(figure)
    known = values[~np.isnan(values)].tolist()
    low, high = max(min(_floor(known), max(known) - 0.02), 0.0), max(*known, 0.02)
    axes.pcolormesh(values, cmap="cividis", vmin=low, vmax=high, edgecolors=PAPER, linewidth=1.5)
    for (row, column), value in np.ndenumerate(values):
        words, colour = f"{100 * value:.1f}", "#ffffff" if value < (low + high) / 2 else "#000000"
        if math.isnan(value):
            words, colour = "failed" if variants[row].get("error") else "n/m", MUTED
        axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xticks([i + 0.5 for i in range(len(languages))], [short(language) for language in languages])
    axes.set_yticks([i + 0.5 for i in range(len(variants))], [_label(v, report) for v in variants])
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    return figure


def _scale_x(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if high > 4 * low:
        axes.set(xscale="log", xlim=(low / 1.35, high * 1.35))
        axes.xaxis.set(major_locator=LogLocator(subs=(1.0, 2.0, 5.0)), minor_locator=NullLocator(),
                       major_formatter=FuncFormatter(lambda x, _: f"{x:g}"))  # fmt: skip
    else:
        pad = 0.15 * (high - low) or 0.2 * high
        axes.set_xlim(max(0.0, low - pad), high + pad)


def _is_recommended(variant: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    choice = report.get("recommendation") or {}
    return bool(variant.get("name")) and variant["name"] in (choice.get("cpu"), choice.get("gpu"))


def _label(variant: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    return ("★ " if _is_recommended(variant, report) else "") + short(variant.get("name"))


def _not_measured(figure: Figure) -> Figure:
    figure.axes[0].set_axis_off()
    figure.text(0.5, 0.5, "not measured", ha="center", va="center", color=MUTED, fontsize=12)
    return figure
