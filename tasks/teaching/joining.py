"""What a teacher found, joined to training. Evaluation splits stay what they are, so that figures stay comparable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.core.manifests import MANIFEST
from tasks.core.rows import rows_of
from tasks.domain.bank import Pattern, Product
from tasks.domain.utterances import Generator
from tasks.teaching.validators import as_pattern, as_product


def join_banks(generator: Generator, lessons: Path) -> None:
    """Let the generator use a teacher's patterns and products, for `train` only.

    Args:
        lessons: folder of the artefact of `teach`.
    """
    patterns: dict[str, list[Pattern]] = {language: [] for language in generator.banks}
    products: dict[str, list[Product]] = {language: [] for language in generator.banks}
    for row in rows_of(lessons / "patterns.jsonl"):
        patterns[row["language"]].append(as_pattern(row))
    for row in rows_of(lessons / "products.jsonl"):
        products[row["language"]].append(as_product(row))
    for language in generator.banks:
        generator.extend_training(language, patterns[language], products[language])


def summary(lessons: Path | None, joined: int, rejected: Counter[str]) -> dict[str, Any]:
    """The `teacher` of the report's `dataset`: what the stage `teach` counted, and what became of its utterances.

    Args:
        joined: utterances that joined training.
        rejected: why others did not.
    """
    if lessons is None:
        return {"teacher": None}
    figures: dict[str, Any] = json.loads((lessons / MANIFEST).read_text(encoding="utf-8"))["metrics"]
    late = {reason.removeprefix("teacher: "): n for reason, n in rejected.items() if reason.startswith("teacher: ")}
    reasons = Counter(figures["rejected"]) + Counter(late)
    return {"teacher": {**figures, "accepted": {**figures["accepted"], "utterances": joined}, "rejected": dict(reasons.most_common())}}


def lasting(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a data set without how many answers were in the log: made again from the log, it would be another data set."""
    taught = figures["teacher"]
    return {**figures, "teacher": taught and {name: value for name, value in taught.items() if name != "requests_from_log"}}


def shown_summary(taught: Any) -> dict[str, Any]:
    """A report's `dataset.teacher` under the names people read; empty if no teacher was asked."""
    if not isinstance(taught, dict):
        return {}
    return {
        "Model": taught.get("model"),
        "Prompt version": taught.get("prompt_version"),
        "Answers": taught.get("requests"),
        "Answers from the log": taught.get("requests_from_log"),
        "Tokens": taught.get("tokens"),
        "USD": taught.get("usd"),
        "USD_reason": taught.get("usd_reason"),
        "Accepted": taught.get("accepted"),
        "Rejected": taught.get("rejected") or "none",
        "Stopped early": taught.get("stopped") or "no",
    }
