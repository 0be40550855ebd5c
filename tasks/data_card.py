"""The data card: what a data set holds, in counts, plots and samples.

`synthesize` counts while it writes, so that the figures are those of the rows; the stage `data_card` draws them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tasks.core.manifests import Manifest
from tasks.core.rows import keep_sample, rows_of
from tasks.core.stage import StageConfig, stage
from tasks.domain.scoring import compact_json
from tasks.domain.spec import load_spec
from tasks.domain.utterances import Names, words_of
from tasks.plot_files import Plot, read_plots, write_plots
from tasks.templating import fill

if TYPE_CHECKING:
    from tasks.core.runner import Runner

CARD = "data_card.json"
SAMPLES = 3  # rows shown of each intent and language
BIN = 10  # characters; the histogram of text lengths
GENERATOR, TEACHER_PATTERN, UNKNOWN, OWN = "generator", "teacher pattern", "unknown", "extra"
UNSEEN = ("test", "hard")  # whose products no row of the generator names in `train`
COUNTED = ("languages", "intents", "noise", "origins")
Json = dict[str, Any]


def origin_kind(origin: str) -> str:
    """Where a row comes from: `generator`, `teacher pattern`, or what stands before the colon, as in `extra:chat`."""
    kind = origin.partition(":")[0]
    if kind.startswith("teacher."):
        return TEACHER_PATTERN
    return GENERATOR if "." in kind else kind  # the id of a pattern: language.intent.hash


class DataCard:
    """Counts rows as they are written, and keeps `SAMPLES` of each intent and language, each row with equal chance.

    Memory depends on how many languages, intents, patterns and products there are, not on how many rows.
    """

    def __init__(self, seed: int) -> None:
        self._rng = Random(f"{seed}/samples")
        self._rows: Counter[str] = Counter()
        self._counts: dict[str, dict[str, Counter[str]]] = {name: {} for name in COUNTED}
        self._distinct: dict[str, dict[str, set[str]]] = {"patterns": {}, "products": {}}
        self._lengths: dict[str, Counter[int]] = {}
        self._samples: dict[tuple[str, str], list[Json]] = {}
        self._met: Counter[tuple[str, str]] = Counter()

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        """Count one row of a split."""
        kind = origin_kind(row["origin"])
        self._rows[split] += 1
        noise = row["noise"] or ["none" if kind in (GENERATOR, TEACHER_PATTERN) else UNKNOWN]
        for name, labels in zip(COUNTED, ([row["language"]], [row["gold"]["intent"]], noise, [kind]), strict=True):
            self._counts[name].setdefault(split, Counter()).update(labels)
        if kind == GENERATOR:
            self._distinct["patterns"].setdefault(split, set()).add(row["origin"])
        if row["product"]:
            self._distinct["products"].setdefault(split, set()).add(row["product"])
        self._lengths.setdefault(split, Counter())[len(row["text"])] += 1
        self._sample(split, row)

    def _sample(self, split: str, row: Mapping[str, Any]) -> None:
        cell = row["gold"]["intent"], row["language"]
        self._met[cell] += 1
        shown = {"split": split, **{name: row[name] for name in ("text", "gold", "origin", "noise")}}
        keep_sample(self._samples.setdefault(cell, []), shown, self._met[cell], SAMPLES, self._rng)

    def counts(self) -> Json:
        """Figures by split: what becomes the metrics of `synthesize`."""
        return {
            "counts": dict(self._rows),
            **{name: {split: dict(sorted(found.items())) for split, found in by.items()} for name, by in self._counts.items()},
            **{name: {split: len(by.get(split, ())) for split in self._rows} for name, by in self._distinct.items()},
            "lengths": {
                split: {f"p{share}": _quantile(found, share / 100) for share in (5, 50, 95, 100)} for split, found in self._lengths.items()
            },
        }

    def write(self, folder: Path, figures: Mapping[str, Any]) -> None:
        """Write `data_card.json`: the figures, a histogram of text lengths, and the samples."""
        bins = {split: Counter[int]() for split in self._lengths}
        for split, found in self._lengths.items():
            for length, times in found.items():
                bins[split][length // BIN * BIN] += times
        card = {
            **figures,
            "length_bins": {split: {str(start): found[start] for start in sorted(found)} for split, found in bins.items()},
            "samples": [{"intent": cell[0], "language": cell[1], "rows": rows} for cell, rows in sorted(self._samples.items())],
        }
        (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _quantile(counts: Counter[int], share: float) -> int:
    """The least value that at least `share` of the counted ones do not exceed."""
    left = share * counts.total()
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)


class DataCardConfig(StageConfig):
    """Nothing to choose: the card shows what is there."""


@stage("data_card", version=2, libraries=("matplotlib",), isolated=False)
def data_card(config: DataCardConfig, inputs: Mapping[str, Path], out_dir: Path) -> Json:
    """Draw the card of `inputs["dataset"]`: `data_card.json`, `data_card.md`, and each plot as PNG and SVG.

    What it adds to the counts of `synthesize` is `named_by_own_rows`, see `named_by_own_rows`.

    A stage of its own, so that a cached run draws nothing and no other stage depends on how a plot looks.
    """
    from tasks.data_plots import draw_data_plots

    card = json.loads((inputs["dataset"] / CARD).read_text(encoding="utf-8"))
    has_own = OWN in card["origins"]["train"]
    card["named_by_own_rows"] = named_by_own_rows(inputs["dataset"]) if has_own else dict.fromkeys(UNSEEN, 0)
    (out_dir / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plots = draw_data_plots(card)
    write_plots(plots, out_dir)
    (out_dir / "data_card.md").write_text(as_markdown(card, plots), encoding="utf-8")
    return {"plots": len(plots), "cells": len(card["samples"]), "named_by_own_rows": card["named_by_own_rows"]}


def named_by_own_rows(dataset: Path) -> dict[str, int]:
    """How many rows of `test` and of `hard` are about a product that a row of one's own names in `train`, in its text or its label.

    A product is named by the first form of its catalog and by each that a label of these splits has, in whole words.
    """
    catalogs = load_spec(str(dataset)).slot_of_type("catalog")
    about: dict[str, Counter[str]] = {split: Counter() for split in UNSEEN}
    forms: dict[str, set[str]] = {}
    for split in UNSEEN:
        for row in rows_of(dataset / f"{split}.jsonl"):
            if product := row["product"]:
                about[split][product] += 1
                forms.setdefault(product, {product}).update(row["gold"][slot] for slot in catalogs if slot in row["gold"])
    names, named = Names(form for written in forms.values() for form in written), set[tuple[str, ...]]()
    for row in rows_of(dataset / "train.jsonl"):
        if origin_kind(row["origin"]) == OWN:
            for said in (row["text"], *(row["gold"].get(slot, "") for slot in catalogs)):
                named |= names.held_by(said)
    known = {product for product, written in forms.items() if not named.isdisjoint(map(words_of, written))}
    return {split: sum(rows for product, rows in found.items() if product in known) for split, found in about.items()}


def as_markdown(card: Json, plots: list[Plot] | None = None) -> str:
    """The whole card as a page of Markdown; without `plots` it refers to no other file."""
    return fill(
        "data_card.md.j2",
        {"card": card, "tables": card_tables(card), "cells": sample_cells(card), "plots": plots or [], "note": note_on_own_rows(card)},
    )


def note_on_own_rows(card: Mapping[str, Any]) -> str:
    """What rows of one's own in training mean for `test` and `hard`; empty where there are none, or nobody looked."""
    if OWN not in card["origins"].get("train", {}) or "named_by_own_rows" not in card:
        return ""
    shares = " and ".join(f"{card['named_by_own_rows'][split]:,} of {card['counts'][split]:,} rows of {split}" for split in UNSEEN)
    return f"Rows of your own in training name the products of {shares}: there, these are not new to the model."


def card_tables(card: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """(what is counted, the splits, rows of a label and its count in each split) for every table of the card."""
    splits = list(card["counts"])
    tables = []
    for name, head in zip(COUNTED, ("Language", "Intent", "Noise", "Origin"), strict=True):
        labels = sorted({label for split in splits for label in card[name].get(split, {})})
        tables.append((head, splits, [[label, *(card[name].get(split, {}).get(label, 0) for split in splits)] for label in labels]))
    whole = [["rows", *card["counts"].values()]]
    whole += [[f"{name} used", *(card[name][split] for split in splits)] for name in ("patterns", "products")]
    for share, words in (("p50", "median length of a text"), ("p95", "95 of 100 texts have at most"), ("p100", "longest text")):
        whole.append([f"{words}, characters", *(card["lengths"][split][share] for split in splits)])
    return [("All rows", splits, whole), *tables]


def sample_cells(card: Mapping[str, Any]) -> dict[str, list[Json]]:
    """The samples by intent: each with its language, its text, its answer, and what is known of it."""
    cells: dict[str, list[Json]] = {}
    for cell in card["samples"]:
        for row in cell["rows"]:
            about = [row["split"], origin_kind(row["origin"]), *row["noise"]]
            shown = {"language": cell["language"], "text": row["text"], "answer": compact_json(row["gold"]), "about": ", ".join(about)}
            cells.setdefault(cell["intent"], []).append(shown)
    return cells


def read_card(folder: Path) -> Json:
    """The drawn card in `folder`, as the report shows it."""
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    plots = read_plots(folder)
    return {
        "tables": card_tables(card),
        "cells": sample_cells(card),
        "note": note_on_own_rows(card),
        "plots": plots,
        "files": [CARD, "data_card.md", *(f"{plot.name}.png" for plot in plots)],
    }


def publish(run: Runner, name: str, dataset: Manifest, card: Manifest) -> None:
    """Show the card where runs are looked at: the data set as an input of the run in MLflow, the card as an artifact in Prefect."""
    from prefect.artifacts import create_markdown_artifact

    folder = run.store.fetch(card)
    shown = json.loads((folder / CARD).read_text(encoding="utf-8"))
    profile = {key: value for key, value in shown.items() if key != "samples"}
    run.tracker.log_dataset(run.tracker.parent, name, dataset.digest, f"{run.store.uri}/{dataset.kind}/{dataset.key}", profile)
    create_markdown_artifact(key="data-card", markdown=as_markdown(shown), description=f"Data card of {name}, {dataset.digest[:12]}")
