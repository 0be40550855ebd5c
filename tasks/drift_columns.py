"""Whether one property of recent texts is spread otherwise than in training: its test, its distance, and what to say of it.

A column has drifted if two things hold: the difference is no chance, and it is large enough to matter. With thousands of texts a test
alone would find differences that nobody minds; with dozens a distance alone would find them in noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FEW = 20  # values on either side, below which a column is not compared
SHOWN = 3  # categories named in words
RESAMPLES = 9999  # so p is never below 1e-4
Kind = Literal["number", "category", "share"]


@dataclass(frozen=True)
class Column:
    """One property of texts, a value a text.

    Attributes:
        kind: `number`; `category`, a label; or `share`, true or false.
        worse: the side on which a difference is drift; None for both.
        allowed: largest distance that is none.
        unit: how numbers are written, a format specification.
    """

    name: str
    title: str
    kind: Kind
    reference: Sequence[Any]
    recent: Sequence[Any]
    allowed: float
    worse: Literal["higher", "lower"] | None = None
    unit: str = ".0f"


def enough(column: Column) -> bool:
    """Whether a column has values enough on both sides to be compared."""
    return min(len(column.reference), len(column.recent)) >= FEW


def compare(column: Column, alpha: float, seed: int) -> dict[str, Any]:
    """Compare a column's recent values with those of training.

    Args:
        alpha: a difference counts if chance makes one as large less often than this.

    Returns:
        `test`, `distance` (share of texts: 0 to 1), `allowed`, `p`, `drift`, `words`, and a summary of each side; for a column with too
        few values `drift` is None and `words` say why.
    """
    about = {"name": column.name, "title": column.title, "kind": column.kind, "allowed": column.allowed}
    if not enough(column):
        values = f"{len(column.recent)} recent texts and {len(column.reference)} of the data set"
        problem = f"not compared: {values} have it, at least {FEW} of each are needed"
        return about | {"test": None, "distance": None, "p": None, "drift": None, "words": problem, "reference": None, "recent": None}
    test, distance, p = {"number": _numbers, "category": _categories, "share": _shares}[column.kind](column, seed)
    drift = p < alpha and distance > column.allowed
    sides = {"reference": _summary(column, column.reference), "recent": _summary(column, column.recent)}
    return about | {"test": test, "distance": distance, "p": p, "drift": drift, "words": _words(column, sides)} | sides


def visible_from(reference: int, recent: int, alpha: float) -> float:
    """The least Kolmogorov-Smirnov distance that is no chance with so many values (Smirnov's limit distribution)."""
    return math.sqrt(-math.log(alpha / 2) / 2 * (reference + recent) / (reference * recent))


def _numbers(column: Column, seed: int) -> tuple[str, float, float]:
    """Two-sample Kolmogorov-Smirnov: the largest difference of the shares of texts below a value."""
    from scipy import stats

    # Scipy names the side of the distribution function, which is lower where values are higher.
    side: Any = {"higher": "less", "lower": "greater", None: "two-sided"}[column.worse]
    found = stats.ks_2samp(column.recent, column.reference, alternative=side)
    return "Kolmogorov-Smirnov", float(found.statistic), float(found.pvalue)


def _categories(column: Column, seed: int) -> tuple[str, float, float]:
    """Chi-squared of the counts, by Monte Carlo, since some are small; total variation: the share of texts with another label."""
    import numpy as np
    from scipy import stats

    before, now = Counter(column.reference), Counter(column.recent)
    labels = sorted(before | now)
    shares = [[counts[label] / counts.total() for label in labels] for counts in (before, now)]
    distance = 0.5 * sum(abs(a - b) for a, b in zip(*shares, strict=True))
    if len(labels) == 1:
        return "chi-squared", 0.0, 1.0
    table = np.array([[counts[label] for label in labels] for counts in (before, now)])
    draw = stats.MonteCarloMethod(n_resamples=RESAMPLES, rng=np.random.default_rng(seed))
    return "chi-squared", distance, float(stats.chi2_contingency(table, correction=False, method=draw).pvalue)


def _shares(column: Column, seed: int) -> tuple[str, float, float]:
    """Fisher's exact test; the difference of the shares."""
    from scipy import stats

    counts = [[sum(values), len(values) - sum(values)] for values in (column.recent, column.reference)]
    now, before = (yes / (yes + no) for yes, no in counts)
    side: Any = {"higher": "greater", "lower": "less", None: "two-sided"}[column.worse]
    difference = {"higher": now - before, "lower": before - now, None: abs(now - before)}[column.worse]
    return "Fisher", max(0.0, difference), float(stats.fisher_exact(counts, alternative=side).pvalue)


def _summary(column: Column, values: Sequence[Any]) -> dict[str, Any]:
    import numpy as np

    if column.kind == "number":
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        return {"n": len(values), "mean": float(np.mean(values)), "p5": float(low), "median": float(middle), "p95": float(high)}
    if column.kind == "share":
        return {"n": len(values), "share": sum(values) / len(values)}
    return {"n": len(values), "shares": {str(label): count / len(values) for label, count in Counter(values).most_common()}}


def _words(column: Column, sides: dict[str, Any]) -> str:
    """What a difference is, for someone who knows no statistics."""
    before, now = sides["reference"], sides["recent"]
    if column.kind == "number":
        figures = [format(side[name], column.unit) for name in ("mean", "p95") for side in (now, before)]
        return "mean {} against {} in training, 95 of 100 at most {} against {}".format(*figures)
    if column.kind == "share":
        return f"{now['share']:.0%} against {before['share']:.0%} in training"
    change = {
        label: abs(now["shares"].get(label, 0) - before["shares"].get(label, 0)) for label in sorted(now["shares"] | before["shares"])
    }
    labels = sorted(change, key=lambda label: -round(change[label], 6))
    parts = [f"{label} {now['shares'].get(label, 0):.0%} against {before['shares'].get(label, 0):.0%}" for label in labels[:SHOWN]]
    return f"{', '.join(parts)} in training"
