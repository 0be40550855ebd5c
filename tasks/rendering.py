"""A finished report as files: `report.json` for machines, `report.html` and `report.md` for people, and the plots."""

import json
import math
import numbers
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tasks.data_card import read_card
from tasks.overhead import rows as overhead_rows
from tasks.plot_files import Plot, read_plots
from tasks.report_columns import (
    CONSTRAINED_COLUMNS,
    CONTENT_COLUMNS,
    DATA,
    FIDELITY_COLUMNS,
    GATE,
    KERNEL_COLUMNS,
    MACHINE,
    MEASURED_COLUMNS,
    OVERHEAD,
    PAPER,
    STAGES,
    TILES,
    TRAINING,
    VARIANT_COLUMNS,
    Column,
)
from tasks.reproducibility import sentences
from tasks.teaching.joining import shown_summary
from tasks.templating import fill
from tasks.variant_figures import REPEATABLE

Json: TypeAlias = dict[str, Any]
ROLES = {"base": "base model", "reference": "16-bit reference", "baseline": "baseline", "api": "API baseline"}
ESTIMATE = "estimate"  # a source that begins so did not measure
VERDICTS = {
    "promote": "Promote: the new model takes the champion's place.",
    "hold": "Hold: the champion stays.",
    "inconclusive": "Inconclusive: the test cannot tell the two models apart, so the champion stays.",
}


def render(report: Json, out_dir: Path, card: Path | None = None, drawn: Path | None = None) -> None:
    """Write `report.json`, `report.html`, `report.md` and one PNG per plot into `out_dir`, which is made if need be.

    `report` is what `tasks/report.py` writes: rates are shares (0 to 1), sizes MB, times ms or s as named.
    Any figure may be None or absent; a sibling `<name>_reason`, or the variant's `notes`, then tells why.
    `card` is the folder of the data card (`tasks/data_card.py`), which is copied beside the report and shown in it; `drawn`
    that of the plots (`tasks/report_plots.py`), which are drawn now if there is none.
    """
    report = json_safe(report)
    plots = {plot.name: plot for plot in (read_plots(drawn) if drawn else _drawn_now(report))}
    out_dir.mkdir(parents=True, exist_ok=True)
    data = read_card(card) if card else {}
    for file in data.get("files", ()):
        shutil.copyfile(card / file, out_dir / file)
    for plot in plots.values():
        (out_dir / f"{plot.name}.png").write_bytes(plot.png)
    for name in ("report.html", "report.md"):
        page = fill(f"{name}.j2", {**_Page(report).sections(), "plots": plots, "card": data})
        _write(out_dir / name, page)
    _write(out_dir / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))


def _write(path: Path, text: str) -> None:
    """Write a file that others may be reading: a run that is taken up again writes where its first report is."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _drawn_now(report: Json) -> list[Plot]:
    from tasks.plots import draw_plots  # matplotlib takes a second to load

    return draw_plots(report)


def json_safe(value: Any) -> Any:
    """A copy of `value` that JSON can hold: floats rounded, NaN and infinity as None, the rest as text."""
    if isinstance(value, Mapping):
        lost = [key for key, item in value.items() if isinstance(item, float) and not math.isfinite(item)]
        reasons = {f"{key}_reason": "the measurement gave no finite number" for key in lost}
        return reasons | {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_safe(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # numpy's scalars too
        number = float(value)
        number = round(number, 4) if abs(number) >= 1 else float(f"{number:.6g}")
        return number if math.isfinite(number) else None
    return str(value)


def _number(value: float) -> str:
    size = abs(value)
    if float(value).is_integer() or size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.1f} s" if minutes < 1 else f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"


FORMS: dict[str, Callable[[float], str]] = {
    "number": _number,
    "time": _duration,
    "percent": lambda value: f"{100 * value:.1f}%",
    "points": lambda value: f"{100 * value:+.1f}",
    "ratio": lambda value: f"{value:.2f}\u00d7",
}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return _number(value) if isinstance(value, int | float) else "none" if value is None else str(value)


def _look(node: Any, path: str | Sequence[str]) -> tuple[Any, Json, str]:
    """The value at `path` (dotted, or a sequence), the mapping around it, and the nearest reason for its absence."""
    reason, parent = "", {}
    for key in path.split(".") if isinstance(path, str) else path:
        parent = node if isinstance(node, dict) else {}
        node, reason = parent.get(key), str(parent.get(f"{key}_reason") or reason)
    if isinstance(node, dict) and "value" in node:
        return node["value"], node, str(node.get("value_reason") or reason)
    return node, parent, reason


def _labels(counts: Any) -> list[str]:
    found = counts if isinstance(counts, dict) else {}
    return [key for key in found if not (key.endswith("_reason") and key.removesuffix("_reason") in found)]


class Cell(NamedTuple):
    text: str
    value: float | str = ""  # what its column is sorted by
    detail: str = ""  # its interval
    hint: str = ""  # the sample size, or the reason why it is missing
    note: int = 0  # the number of that reason; 0 for a measured figure


class Row(NamedTuple):
    head: str
    cells: Sequence[Cell]
    badges: Sequence[str] = ()
    sub: str = ""
    error: str = ""  # a row with an error has no cells


class Table(NamedTuple):
    head: str  # the title of the first column, which names the rows
    columns: Sequence[Column]
    rows: Sequence[Row]


def _check(check: Json) -> str:
    """A check of the gate in words."""
    passed = {True: "passed", False: "failed", None: "cannot tell"}[check.get("passed")]
    return f"{passed} · {_text(check.get('name'))}"


def quiet(measurement: Any) -> str:
    """A sentence on whether other programs disturbed the measurements."""
    if not isinstance(measurement, Mapping):
        return ""
    busy = f"other programs kept up to {measurement['others_cores']:.2f} of its cores busy, other machines on the same host took {measurement['stolen_cores']:.2f}"
    spread = measurement.get("spread") or 0.0
    if measurement["quiet"] and spread > REPEATABLE:
        return f"No other program was seen to disturb the machine: while a variant was measured, {busy}. Yet runs of {measurement['least_steady']} lay {spread:.0%} apart: medians are no better than that."
    if measurement["quiet"]:
        return f"The machine was quiet: while a variant was measured, {busy}."
    return f"The machine was not quiet: while a variant was measured, {busy}. Most disturbed: {measurement['most_disturbed']}. Speeds are too low by as much."


def energy(variants: Iterable[Json]) -> str:
    """A sentence on what tells the energy of requests: counters, or an estimate."""
    sources = dict.fromkeys(_text(source) for v in variants if (source := (v.get("performance") or {}).get("energy_source")))
    return f"Energy per request: {'; '.join(sources)}." if sources else ""


class _Page:
    """What the templates print: tables of finished text, and the numbered reasons for what is missing."""

    def __init__(self, report: Json) -> None:
        self.report = report
        self.reasons: list[str] = []
        self.variants: list[Json] = report.get("variants") or []
        self.choice: Json = report.get("recommendation") or {}
        self.names = dict.fromkeys(name for name in (self.choice.get("cpu"), self.choice.get("gpu")) if name)
        self.recommended = [v for name in self.names for v in self.variants if v.get("name") == name]

    def sections(self) -> Json:
        """The sections, in the order in which a missing figure is to be numbered."""
        report, data, gate = self.report, self.report.get("dataset") or {}, self.report.get("gate") or {}
        compared = [v for v in self.variants if v.get("role") not in ("reference", "baseline") and not v.get("error")]
        heads = {"by_language": "Language", "by_intent": "Intent", "slot_f1": "Slot, F1"}
        counted = {"counts": "Split", "languages": "Language", "intents": "Intent", "noise": "Noise", "origins": "Origin",
                   "rejected": "Reason for rejection"}  # fmt: skip
        stages = [{**stage, "key": (stage.get("key") or "")[:12]} for stage in report.get("stages") or []]
        return {
            "report": report,
            "choices": self._facts(self.choice, [Column("CPU", "cpu"), Column("GPU", "gpu")]),
            "why": _text(self.choice.get("why") or ""),
            "constraints": _text({name: limit for name, limit in (self.choice.get("constraints") or {}).items() if limit is not None}),
            "gate": self._facts(gate, GATE) if gate else [],
            "verdict": self._cell(report, "gate.verdict", otherwise="no gate was run"),
            "verdicts": VERDICTS,
            "checks": [_check(check) for check in gate.get("checks") or []],
            "tiles": {_text(v.get("name")): self._facts(v, TILES) for v in self.recommended},
            "variants": self._variants(VARIANT_COLUMNS, self.variants),
            "notes": {_text(v.get("name")): v["notes"] for v in self.variants if v.get("notes")},
            "fidelity": self._variants(FIDELITY_COLUMNS, compared),
            "contents": self._variants(CONTENT_COLUMNS, [v for v in compared if v.get("tensor_types")]),
            "constrained": self._variants(CONSTRAINED_COLUMNS, [v for v in compared if v.get("constrained")]),
            "measured": self._measured(),
            "kernels": self._kernels(),
            "quiet": quiet(report.get("measurement")),
            "energy": energy(self.variants),
            "breakdowns": [self._breakdown(head, key) for key, head in heads.items()],
            "paper": self._table("Claim of the paper", PAPER, report.get("paper") or [], "claim"),
            "counts": [self._counts(head, data, key) for key, head in counted.items()],
            "data": self._facts({**data, "teacher": (taught := shown_summary(data.get("teacher"))).get("Model", "none")}, DATA),
            "teacher": self._facts(taught, [Column(name, name, "text") for name in _labels(taught)]),
            "training": self._facts(report.get("training"), TRAINING),
            "stages": self._table("Stage", STAGES, stages, "name"),
            "overhead": self._table("Where", OVERHEAD, overhead_rows(report.get("overhead")), "where"),
            "reproducibility": sentences(report.get("reproducibility")),
            "machine": self._facts(report.get("environment"), MACHINE),
            "wall": self._cell(report, "wall_s", "time"),
            "not_run": self._not_run(),
            "reasons": self.reasons,
        }

    def _cell(self, node: Any, path: str | Sequence[str], form: str = "number", otherwise: str = "", source: str = "") -> Cell:
        value, around, reason = _look(node, path)
        if value is None:
            reason = reason or otherwise or "no reason was recorded"
            if reason not in self.reasons:
                self.reasons.append(reason)
            return Cell("not measured", hint=reason, note=self.reasons.index(reason) + 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Cell(_text(value), _text(value))
        if source:
            told = _text(around.get(source) or "")
            return Cell(FORMS.get(form, _number)(value), value, ESTIMATE if told.startswith(ESTIMATE) else "", told)
        show, ends = FORMS.get(form, _number), [around.get(end) for end in ("low", "high")]
        if None in ends or value not in (around.get("value"), around.get("delta")):  # not the figure the ends belong to
            return Cell(show(value), value)
        detail = " to ".join(show(end) for end in ends if end is not None).replace("%", "")
        return Cell(show(value), value, detail, f"n = {around['n']}" if around.get("n") else "")

    def _facts(self, node: Any, columns: Iterable[Column]) -> list[tuple[Column, Cell]]:
        return [(column, self._cell(node, column.path, column.form)) for column in columns]

    def _table(self, head: str, columns: list[Column], nodes: list[Json], name: str) -> Table:
        rows = [Row(_text(node.get(name)), [self._cell(node, c.path, c.form) for c in columns]) for node in nodes]
        return Table(head, columns, rows)

    def _variants(self, columns: list[Column], variants: list[Json]) -> Table:
        kept = [c for c in columns if not c.optional or any(_look(v, c.path)[0] is not None for v in variants)]
        rows = []
        for variant in variants:
            name, role, error, notes = (variant.get(key) or "" for key in ("name", "role", "error", "notes"))
            cells = [] if error else [self._cell(variant, c.path, c.form, " ".join(notes), c.source) for c in kept]
            badges = ["recommended"] * (name in self.names) + ["Pareto"] * (name in (self.report.get("pareto") or []))
            sub = [_text(variant[key]) for key in ("format", "runtime", "device") if variant.get(key)]
            sub += [f"{variant['threads']} threads"] if variant.get("threads") else []
            badges += [ROLES[role]] if role in ROLES else []
            rows.append(Row(_text(name), cells, badges, " · ".join(sub), _text(error)))
        return Table("Variant", kept, rows)

    def _measured(self) -> Table:
        """How speed and memory were measured, with a column for each number of requests at a time above one."""
        shown = [v for v in self.variants if v.get("performance") and v.get("role") not in ("base", "api")]
        loads = {int(load) for v in shown for load in _labels(v["performance"].get("requests_s_by_load"))} - {1}
        columns = [Column(f"{load} at a time", f"performance.requests_s_by_load.{load}", "number", "Requests/s") for load in sorted(loads)]
        waits = {int(load) for v in shown for load in _labels(v["performance"].get("latency_ms_by_load"))} - {1}
        columns += [Column(f"Latency p95, {load} at a time, ms", f"performance.latency_ms_by_load.{load}.p95") for load in sorted(waits)]
        return self._variants([*MEASURED_COLUMNS[:6], *columns, *MEASURED_COLUMNS[6:]], shown)

    def _kernels(self) -> Table:
        """Kernels that multiply by GPTQ weights, a row for each variant and kernel."""
        tried = [(v, kernel) for v in self.variants for kernel in (v.get("performance") or {}).get("kernels") or ()]
        rows = []
        for v, kernel in tried:
            error = _text(kernel.get("error") or "")
            cells = [] if error else [self._cell(kernel, c.path, c.form) for c in KERNEL_COLUMNS]
            rows.append(Row(f"{_text(v.get('name'))}, {_text(kernel.get('name'))}", cells, error=error))
        return Table("Variant and kernel", KERNEL_COLUMNS, rows)

    def _breakdown(self, head: str, key: str) -> Table:
        shown = self.recommended + [v for v in self.variants if v.get("role") in ("base", "api") and not v.get("error")]
        labels = dict.fromkeys(label for v in shown for label in _labels(_look(v, ["quality", key])[0]))
        rows = [
            Row(label, [self._cell(v, ["quality", key, label], "percent", "neither labels nor answers have it") for v in shown])
            for label in labels
        ]
        return Table(head, [Column(_text(v.get("name")), "") for v in shown], rows)

    def _counts(self, head: str, data: Json, key: str) -> Table:
        counts = data.get(key)
        if not isinstance(counts, dict):
            return Table(head, [Column("Rows", "")], [Row("all", [self._cell(data, key)])])
        splits = [split for split in _labels(counts) if isinstance(counts[split], dict)]
        if not splits:
            return Table(head, [Column("Rows", "")], [Row(label, [self._cell(counts, [label])]) for label in _labels(counts)])
        labels = sorted({label for split in splits for label in _labels(counts[split])})
        rows = [Row(label, [self._cell({"n": counts[split].get(label, 0)}, "n") for split in splits]) for label in labels]
        return Table(head, [Column(split, "") for split in splits], rows)

    def _not_run(self) -> list[str]:
        lines = [_text(line) for line in self.report.get("not_run") or []]
        lines += [f"{v.get('name')} failed: {_text(v['error'])}" for v in self.variants if v.get("error")]
        for column in VARIANT_COLUMNS + FIDELITY_COLUMNS:
            found = [_look(v, column.path) for v in self.variants if not v.get("error")]
            if column.optional and all(value is None for value, _, _ in found):
                reasons = [reason or "no reason was recorded" for _, _, reason in found] or ["no variant"]
                lines.append(f"{column.label}: not measured ({max(reasons, key=reasons.count)}).")
        return lines
