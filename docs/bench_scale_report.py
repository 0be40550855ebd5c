"""What bench_scale.py's measurements say: laws fitted to medians, what follows for sizes that no machine here can have, tables and plots."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from docs.bench_scale_stages import Shape

Record = dict[str, Any]  # dimension, size, repeat, x (what a cost grows with, by name), samples, conditions
START, END = "<!-- figures of {}: written by `make bench-scale` -->", "<!-- end of figures of {} -->"
LARGEST_PNG = 100_000  # bytes

# Llama 3.2 1B and Llama 3.1 8B, by their configurations.
BILLIONS = {
    "1B": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128_256),
    "8B": Shape(hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, head_size=128, vocabulary=128_256, tied=False),
}


class Law(NamedTuple):
    """`fixed + factor * x ** power`."""

    fixed: float
    factor: float
    power: float

    def at(self, x: float) -> float:
        return self.fixed + self.factor * x**self.power


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the logarithms: 1 where the cost doubles with the size, less where a part of it is fixed."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def fit(kind: Literal["linear", "power"], xs: Sequence[float], ys: Sequence[float]) -> Law:
    """The law nearest to figures, all of which are positive, by their relative errors; a linear one has no negative part.

    `linear` is for what has a reason to be: so much for each row, weight or worker, and something once. `power` is for the rest.
    """
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    if kind == "power":
        power = exponent(xs, ys)
        return Law(0.0, float(np.exp(np.mean(np.log(y) - power * np.log(x)))), power)
    fixed, factor = (float(value) for value in np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones_like(y), rcond=None)[0])
    if fixed < 0:
        return Law(0.0, float(np.sum(x / y) / np.sum((x / y) ** 2)), 1.0)
    if factor < 0:
        return Law(float(np.sum(1 / y) / np.sum(1 / y**2)), 0.0, 1.0)
    return Law(fixed, factor, 1.0)


class Series(NamedTuple):
    """One figure against what it grows with."""

    figure: str
    label: str
    x: str = "size"
    law: Literal["linear", "power"] = "linear"

    @property
    def unit(self) -> str:
        return {"s": "seconds", "mb": "MB", "ms": "ms", "cores": "cores"}[self.figure.rsplit("_", 1)[1]]


@dataclass(frozen=True)
class Dimension:
    """What grows, how its figures are shown, and where they are carried to."""

    of: str
    series: tuple[Series, ...]
    targets: Mapping[str, Mapping[str, float]]
    conditions: str


def _counts(*numbers: int) -> dict[str, dict[str, float]]:
    return {f"{number:,}": {"size": number} for number in numbers}


DIMENSIONS = {
    "rows": Dimension(
        "training rows",
        (Series("synthesize_s", "synthesize"), Series("synthesize_mb", "synthesize, peak RSS"), Series("file_mb", "train.jsonl")),
        _counts(1_000_000),
        "Stage `synthesize` as `standard` has it, with its evaluation rows.",
    ),
    "training": Dimension(
        "training rows",
        (Series("finetune_s", "finetune"), Series("finetune_mb", "finetune, peak RSS")),
        _counts(60_000, 1_000_000),
        "Stage `finetune` of `smoke`: the random model of 3 million weights, one epoch, batches of 16, one process, not compiled.",
    ),
    "variants": Dimension(
        "GGUF formats",
        (
            Series("all_s", "all together"),
            Series("quantize_s", "quantize, each"),
            Series("check_s", "check, each"),
            Series("evaluate_s", "evaluate, each"),
            Series("benchmark_s", "benchmark, each"),
            Series("disk_mb", "files"),
        ),
        _counts(12),
        "The tiny model of `smoke` in the first of F16, Q8_0, Q4_0, Q5_0, Q4_1, IQ4_NL: quantized, checked, evaluated, measured.",
    ),
    "languages": Dimension(
        "languages",
        (Series("synthesize_s", "synthesize"), Series("synthesize_mb", "synthesize, peak RSS"), Series("evaluate_s", "evaluate")),
        _counts(12),
        "For each language 5,000 rows of training, 72 of `validation`, 168 of `test` and 48 of `hard`; the tiny model of `smoke` in F16 is asked the last two.",
    ),
    "model": Dimension(
        "weights",
        (
            Series("train_ms", "training, a token", "layers"),
            Series("train_mb", "training, peak RSS"),
            Series("merge_s", "merge"),
            Series("merge_mb", "merge, peak RSS"),
            Series("convert_s", "convert to GGUF"),
            Series("quantize_s", "quantize to Q4_0"),
            Series("gguf_mb", "Q4_0 file", "file"),
            Series("request_ms", "a request, Q4_0", "read"),
            Series("decode_ms", "a written token, Q4_0", "read"),
            Series("serve_mb", "RSS of Q4_0", "file"),
        ),
        {name: shape.x() for name, shape in BILLIONS.items()},
        "Random Llamas with the offline model's vocabulary; the largest has the shape of SmolLM2-135M. Training: QLoRA of rank 16, NF4 unpacked, batches of "
        "16 rows of about 27 tokens, one process, not compiled (`train.compile` would be quicker), steps after the second. A request: 12 tokens written.",
    ),
    "workers": Dimension(
        "polling workers",
        (
            Series("poll_ms", "a poll", law="power"),
            Series("write_ms", "a flow run written", law="power"),
            Series("server_cores", "the server's processor"),
            Series("server_mb", "the server's memory"),
        ),
        _counts(50),
        "A Prefect server with SQLite as `make up` starts it; workers poll every second, none gets work. Many workers in one process of the same machine, which "
        "takes processor time too. A flow run is written each second.",
    ),
    "mlflow": Dimension(
        "runs that are there",
        (Series("child_ms", "a child run written", law="power"), Series("parent_ms", "a pipeline run begun", law="power"), Series("database_mb", "database")),
        _counts(100_000),
        "MLflow's SQLite file, no server. A child run has the parameters and metrics of `finetune`; those that are there were copied, 40 to a pipeline run.",
    ),
}  # fmt: skip


def pooled(records: Sequence[Record], dimension: str, series: Series) -> dict[float, list[float]]:
    """All samples of a figure, of all repeats, by what it grows with."""
    found: dict[float, list[float]] = {}
    for record in sorted((r for r in records if r["dimension"] == dimension), key=lambda record: record["size"]):
        found.setdefault(record["x"][series.x], []).extend(record["samples"][series.figure])
    return found


def foretold(series: Series, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """What the other sizes say of the largest one, as a share of what was measured there; None for fewer than three sizes."""
    return fit(series.law, xs[:-1], ys[:-1]).at(xs[-1]) / ys[-1] if len(xs) > 2 else None


def shown(figure: float) -> str:
    """Three digits that count."""
    if figure == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(figure))))
    return f"{figure:,.{digits}f}"


def table(name: str, records: Sequence[Record]) -> str:
    """Conditions, medians with their number, the exponent, and what follows for the targets, as Markdown."""
    dimension, mine = DIMENSIONS[name], [record for record in records if record["dimension"] == name]
    if not mine:
        return "Not measured yet."
    sizes = sorted({record["size"] for record in mine})
    targets = "".join(f" {label} (extrapolated) |" for label in dimension.targets)
    lines = [
        f"{dimension.conditions} {conditions(mine)}",
        "",
        f"| by {dimension.of} | " + "".join(f"{size:,} | " for size in sizes) + f"n | exponent | largest, from the others |{targets}",
        "| --- |" + " ---: |" * (len(sizes) + 3 + len(dimension.targets)),
    ]
    for series in dimension.series:
        samples = pooled(mine, name, series)
        xs, ys = list(samples), [statistics.median(values) for values in samples.values()]
        numbers = sorted({len(values) for values in samples.values()})
        cells = [shown(y) for y in ys] + ["" for _ in range(len(sizes) - len(ys))]
        cells.append(f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
        if len(xs) > 1:
            law, checked = fit(series.law, xs, ys), foretold(series, xs, ys)
            cells += [f"{exponent(xs, ys):.2f}", "" if checked is None else f"{checked:.0%}"]
            cells += [shown(law.at(x[series.x])) for x in dimension.targets.values()]
        else:
            cells += [""] * (2 + len(dimension.targets))
        lines.append(f"| {series.label}, {series.unit} | {' | '.join(cells)} |")
    return "\n".join([*lines, *remarks(name, mine), "", f"![Cost by {dimension.of}](scaling-{name}.png)"])


def conditions(records: Sequence[Record]) -> str:
    """On what machine, when, and how busy it was with other things."""
    first, days = records[0]["conditions"], sorted({record["conditions"]["day"] for record in records})
    busiest = max(record["conditions"]["others_cores"] + record["conditions"]["stolen_cores"] for record in records)
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{first['cpu']}, {first['cores']} cores, {first['precision']}, {when}; other programs and the host took at most {busiest:.2f} cores."


def remarks(name: str, records: Sequence[Record]) -> list[str]:
    """What follows from the laws of a dimension and stands in no column."""
    if name == "model":
        return ["", reckoned()]
    if name != "workers":
        return []
    samples = pooled(records, name, next(series for series in DIMENSIONS[name].series if series.figure == "server_cores"))
    slow = {size: np.percentile(values, 95) for size, values in pooled(records, name, DIMENSIONS[name].series[0]).items()}
    said = ["", "95 of 100 polls took less than " + ", ".join(f"{shown(float(ms))} ms ({size:,.0f})" for size, ms in slow.items()) + "."]
    if len(samples) > 1:
        law = fit("linear", list(samples), [statistics.median(values) for values in samples.values()])
        if law.factor > 0:
            said.append(
                f"A worker costs {law.factor:.4f} cores; the server is one process, whose core would be full with {(1 - law.fixed) / law.factor:,.0f} workers."
            )
    return said


def reckoned() -> str:
    """What a model of a billion weights and more needs on a GPU: arithmetic on its shape, no measurement."""
    lines = ["Reckoned from the shapes, not measured:", "", "| | " + " | ".join(BILLIONS) + " |", "| --- |" + " ---: |" * len(BILLIONS)]
    kinds = {
        "weights, billions": lambda s: s.parameters / 1e9,
        "of them in layers, billions": lambda s: s.linear / 1e9,
        "operations to read a token, billions": lambda s: 2 * s.linear / 1e9,
        "operations to train on a token, billions": lambda s: 4 * s.linear / 1e9,
        "layers in NF4 with double quantization (4.13 bits), GB": lambda s: s.linear * 4.127 / 8 / 1e9,
        "embeddings and head in 16 bits, GB": lambda s: (s.parameters - s.linear) * 2 / 1e9,
        "adapter of rank 16 with gradients and Adam's two means (16 bytes a weight), GB": lambda s: adapter(s, 16) * 16 / 1e9,
        "Q4_0 file (4.5 bits a weight, 6.56 in the head), GB": lambda s: s.file_mb / 1e3,
    }
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(shown(of(s)) for s in BILLIONS.values()) + " |" for name, of in kinds.items())])


def adapter(shape: Shape, rank: int) -> int:
    """Weights of LoRA matrices beside all of a layer's products."""
    inner, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    products = [
        (shape.hidden, inner),
        (shape.hidden, kv),
        (shape.hidden, kv),
        (inner, shape.hidden),
        *[(shape.hidden, shape.intermediate)] * 3,
    ]
    return shape.layers * rank * sum(read + written for read, written in products)


def plot(name: str, records: Sequence[Record], path: Path) -> None:
    """Measured medians filled, what follows for targets hollow, and the law between them; one panel for each unit and kind of size."""
    from matplotlib.figure import Figure
    from PIL import Image

    from tasks.plot_style import FORMATS, GRID, INK

    dimension = DIMENSIONS[name]
    panels: dict[tuple[str, str], list[Series]] = {}
    for series in dimension.series:
        panels.setdefault((series.unit, series.x), []).append(series)
    columns = min(2, len(panels))
    grid = (-(-len(panels) // columns), columns)
    figure = Figure(figsize=(5.2 * grid[1], 4.2 * grid[0]), layout="constrained")
    colours = [*FORMATS.values(), ("#56b4e9", "v")]
    what = {
        "size": dimension.of,
        "layers": "weights of the layers",
        "file": "MB of the Q4_0 file, reckoned",
        "read": "MB read for a token, reckoned",
    }
    for axes, ((unit, x_name), members) in zip(figure.subplots(*grid, squeeze=False).flat, panels.items(), strict=False):
        for series, (colour, marker) in zip(members, colours, strict=False):
            samples = pooled(records, name, series)
            xs, ys = list(samples), [statistics.median(values) for values in samples.values()]
            label, drawn = series.label, {"color": colour, "marker": marker, "linestyle": "none"}
            if len(xs) > 1:
                law, targets = fit(series.law, xs, ys), [target[x_name] for target in dimension.targets.values()]
                label = f"{label}: exponent {exponent(xs, ys):.2f}"
                line = np.geomspace(min(xs), max([*xs, *targets]), 50)
                axes.plot(line, [law.at(x) for x in line], color=colour, linewidth=0.9)
                axes.plot(targets, [law.at(x) for x in targets], **drawn, markerfacecolor="none", gid=f"extrapolated {series.figure}")
            axes.plot(xs, ys, **drawn, label=label)
        axes.set(xscale="log", yscale="log", xlabel=what[x_name], ylabel=unit)
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8, labelcolor=INK)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    image = io.BytesIO()
    figure.savefig(image, dpi=90)
    Image.open(image).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)  # a third of the bytes
    if path.stat().st_size > LARGEST_PNG:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST_PNG:,}")


def write(records: Sequence[Record], template: str, folder: Path) -> Path:
    """`scaling.md` with the tables in their places, and a plot of each dimension beside it.

    Raises:
        ValueError: the text has no place for a dimension.
    """
    text = template
    for name in DIMENSIONS:
        start, end = START.format(name), END.format(name)
        if start not in text or end not in text:
            raise ValueError(f"There is no place for {name}: {start}")
        text = f"{text.split(start)[0]}{start}\n{table(name, records)}\n{end}{text.split(end)[1]}"
        if any(record["dimension"] == name for record in records):
            plot(name, records, folder / f"scaling-{name}.png")
    page = folder / "scaling.md"
    page.write_text(text, encoding="utf-8")
    return page
