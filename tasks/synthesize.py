"""Stage `synthesize`: labelled utterances for training and evaluation, offline, from the domain's phrase banks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from tasks.core import progress
from tasks.core.stage import StageConfig, stage
from tasks.domain.bank import load_bank
from tasks.domain.labelled import read_labelled
from tasks.domain.noise import KINDS
from tasks.domain.scoring import normalise, text_contains_slots
from tasks.domain.spec import AnswerStyle, PromptStyle, Spec, load_spec
from tasks.domain.utterances import SPLITS, Generator, Split, Style

NEAR_DUPLICATE = 90.0  # rapidfuzz ratio (0..100) of normalised texts from which two rows count as the same
ATTEMPTS = 30  # other rows tried for one turn before it is left out


class LeakError(ValueError):
    """A row of `test` or `hard` is in `train`; the message names the rows."""


class SynthesizeConfig(StageConfig):
    """What data to make."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"domain", "extra"})
    domain: str = Field("ecommerce", description="Name of a domain, or path of a folder with a spec.yaml")
    domain_sha256: str = Field("", description="Digest of the domain's files; filled in, so that a changed phrase bank is new data")
    languages: tuple[str, ...] = Field(("en", "de", "es", "fr", "it", "hr"), min_length=1, description="Languages of the domain to use")
    intents: tuple[str, ...] = Field((), description="Intents of the domain to use; empty for all")
    train_rows: int = Field(4000, ge=24, le=2_000_000)
    validation_rows: int = Field(144, ge=12, le=100_000)
    test_rows: int = Field(300, ge=12, le=100_000)
    hard_rows: int = Field(144, ge=12, le=100_000)
    noise_rate: float = Field(0.35, ge=0, le=1, description="Share of rows with noise; `hard` has 0.3 more")
    decoration_rate: float = Field(0.5, ge=0, le=1, description="How often greetings, thanks and chatter surround an utterance")
    patterns_per_intent: int | None = Field(
        None, ge=2, description="Use only so many phrase patterns of each intent and language; null for all"
    )
    held_out_noise: tuple[str, ...] = Field(("upper", "keyboard", "missing_space"), description="Kinds of noise that only `hard` has")
    prompt: PromptStyle = Field(
        "short", description="What the fine-tuned model reads: the customer's text alone, or a chat with a system prompt"
    )
    answer: AnswerStyle = Field(
        "short", description="What the fine-tuned model writes: a few short lines, or the JSON itself in twice the tokens"
    )
    extra: tuple[str, ...] = Field(
        (), description="Labelled JSONL files of your own that join training: a `text` and its `gold` answer a line"
    )
    extra_sha256: tuple[str, ...] = Field((), description="Digests of these files; filled in, so that a changed file is new data")
    teacher: Literal["none"] = Field("none", description="A model that extends the phrase banks; `none` works offline")
    seed: int = Field(7, ge=0)

    @field_validator("held_out_noise")
    @classmethod
    def _known_noise(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"unknown noise {unknown[0]!r}. Allowed: {', '.join(KINDS)}")
        return kinds

    def rows(self, split: Split) -> int:
        return {"train": self.train_rows, "validation": self.validation_rows, "test": self.test_rows, "hard": self.hard_rows}[split]


def make_generator(config: SynthesizeConfig) -> Generator:
    """The generator a config describes; reads and checks the domain's files.

    Raises:
        UserError: an unknown language or a broken file.
    """
    spec = load_spec(config.domain)
    banks = {language: load_bank(spec, language) for language in config.languages}
    usual = tuple(kind for kind in KINDS if kind not in config.held_out_noise)
    plain = Style(usual, config.noise_rate, config.decoration_rate)
    hard = Style(tuple(KINDS), min(1.0, config.noise_rate + 0.3), min(1.0, config.decoration_rate + 0.2))
    styles: dict[Split, Style] = {"train": plain, "validation": plain, "test": plain, "hard": hard}
    return Generator(spec, banks, styles, config.seed, list(config.intents) or None, config.patterns_per_intent)


@stage("synthesize", version=3, libraries=("rapidfuzz",))
def synthesize(config: SynthesizeConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `<split>.jsonl`, one row a line, and return the counts of the data card.

    Evaluation rows are made first; a training row that repeats one of them, or another training row, is replaced.

    Raises:
        LeakError: a row of `test` or `hard` has a near-duplicate in `train`.
    """
    generator = make_generator(config)
    rejected: Counter[str] = Counter()
    seen: set[str] = set()
    held_out: list[str] = []
    card: dict[str, Any] = {"counts": {}, "languages": {}, "intents": {}, "noise": {}, "patterns": {}, "products": {}, "origins": {}}
    total = sum(config.rows(split) for split in SPLITS)
    made = 0
    for split in ("test", "hard", "validation", "train"):
        counts: dict[str, Counter[str]] = {name: Counter() for name in ("languages", "intents", "noise", "patterns", "products", "origins")}
        with (out_dir / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            number = 0
            for row in _distinct_rows(generator, split, config.rows(split), seen, held_out if split == "train" else [], rejected):
                file.write(json.dumps({"id": f"{split}-{number}", **row}, ensure_ascii=False) + "\n")
                number += 1
                counts["languages"][row["language"]] += 1
                counts["intents"][row["gold"]["intent"]] += 1
                counts["noise"].update(row["noise"] or ["none"])
                counts["patterns"][row["origin"]] += 1
                counts["products"][row["product"] or ""] += 1
                counts["origins"]["generator"] += 1
                if split != "train":
                    held_out.append(comparable(row["text"]))
                progress.advance(made + number, total, split)
            if split == "train":
                for row in extra_rows(config.extra, generator.spec, seen, held_out, rejected):
                    file.write(json.dumps({"id": f"extra-{number}", **row}, ensure_ascii=False) + "\n")
                    number += 1
                    counts["languages"][row["language"]] += 1
                    counts["intents"][row["gold"]["intent"]] += 1
                    counts["origins"]["extra"] += 1
        made += config.rows(split)
        card["counts"][split] = number
        for name in ("languages", "intents", "noise", "origins"):
            card[name][split] = dict(sorted(counts[name].items()))
        card["patterns"][split], card["products"][split] = len(counts["patterns"]), len(set(counts["products"]) - {""})
    check_leakage(out_dir)
    # Later stages read prompt and schema from the data set, so that what was trained and what is asked cannot differ.
    written = (generator.spec.path / "spec.yaml").read_text(encoding="utf-8")
    (out_dir / "spec.yaml").write_text(f"{written}\nprompt: {config.prompt}\nanswer: {config.answer}\n", encoding="utf-8")
    return {
        **card,
        "duplicates_removed": sum(n for reason, n in rejected.items() if "duplicate" in reason),
        "rejected": dict(rejected),
        "teacher": None,
    }


def _distinct_rows(
    generator: Generator, split: Split, rows: int, seen: set[str], held_out: list[str], rejected: Counter[str]
) -> Iterator[dict[str, Any]]:
    from rapidfuzz import fuzz, process

    for index in range(rows):
        for attempt in range(ATTEMPTS):
            row = generator.row(split, index, attempt)
            text = comparable(row["text"])
            if text in seen:
                rejected["duplicate"] += 1
            elif not text_contains_slots(row["text"], row["gold"], generator.spec):
                rejected["slot_not_in_text"] += 1
            elif held_out and process.extractOne(text, held_out, scorer=fuzz.ratio, score_cutoff=NEAR_DUPLICATE):
                rejected["near_duplicate_of_evaluation"] += 1
            else:
                seen.add(text)
                yield row
                break
        else:
            rejected["no_new_row_found"] += 1


def extra_rows(paths: tuple[str, ...], spec: Spec, seen: set[str], held_out: list[str], rejected: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows of the user's own files as rows of `train`; what cannot be used, or is nearly an evaluation row, is counted.

    Raises:
        UserError: a file cannot be read.
    """
    from rapidfuzz import fuzz, process

    for path in paths:
        rows, bad = read_labelled(Path(path), spec)
        for _, problem in bad:
            rejected[f"extra: {problem.partition('. Allowed')[0]}"[:120]] += 1
        for row in rows:
            text = comparable(row["text"])
            if process.extractOne(text, held_out, scorer=fuzz.ratio, score_cutoff=NEAR_DUPLICATE):
                rejected["extra: near_duplicate_of_evaluation"] += 1
            elif text in seen:
                rejected["extra: duplicate"] += 1
            else:
                seen.add(text)
                yield {
                    "text": row["text"],
                    "gold": row["gold"],
                    "language": row.get("language", "?"),
                    "split": "train",
                    "origin": f"extra:{row['source']}" if "source" in row else "extra",
                    "product": None,  # of the generator's catalog only: a shop's own rows may name what `test` asks about
                    "noise": [],
                }


def comparable(text: str) -> str:
    """A text as duplicates are looked for; emoji-only texts, of which nothing would be left, stay as they are."""
    return str(normalise(text)) or text


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one split."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def check_leakage(folder: Path) -> None:
    """Compare `test` and `hard` with `train`, as written: near-duplicate texts, products, and the phrase patterns of `hard`.

    Reads `train` in parts, so that memory does not grow with it.

    Raises:
        LeakError: names the rows that leak.
    """
    import numpy as np
    from rapidfuzz import fuzz, process

    held_out = {split: read_rows(folder / f"{split}.jsonl") for split in ("test", "hard")}
    texts = {split: [comparable(row["text"]) for row in rows] for split, rows in held_out.items()}
    leaks: dict[str, list[str]] = {split: [] for split in held_out}
    patterns: set[str] = set()
    products: set[str | None] = set()
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        for part in batched((json.loads(line) for line in file), 10_000):
            patterns |= {row["origin"] for row in part}
            products |= {row["product"] for row in part} - {None}
            trained = [comparable(row["text"]) for row in part]
            for split, rows in held_out.items():
                scores = process.cdist(texts[split], trained, scorer=fuzz.ratio, score_cutoff=NEAR_DUPLICATE, dtype=np.uint8)
                leaks[split] += [f"{rows[i]['id']} ~ {part[j]['id']}" for i, j in zip(*np.nonzero(scores), strict=True)]
    for split, rows in held_out.items():
        shared = [row["id"] for row in rows if row["product"] in products or (split == "hard" and row["origin"] in patterns)]
        if found := shared + leaks[split]:
            raise LeakError(f"{len(found)} rows of {split} are in train: {', '.join(found[:10])}")


def batched(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of at most `size` rows (`itertools.batched` of Python 3.12)."""
    iterator = iter(rows)
    while part := list(itertools.islice(iterator, size)):
        yield part
