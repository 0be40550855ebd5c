"""Two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tasks.core.rows import rows_of
from tasks.domain.scoring import Z95

DRAWS = 2000  # of the bootstrap
FEW = 10  # rows in which two models differ


def correct_rows(folder: Path) -> list[bool]:
    """Which rows of `test` an evaluation got right."""
    return [row["correct"] for row in rows_of(folder / "test.jsonl")]


def paired_interval(won: int, lost: int, n: int) -> tuple[float, float]:
    """95% interval of the difference of two shares on the same rows (Agresti and Min 2005, doi:10.1002/sim.1781).

    Unlike a bootstrap it does not shrink to nothing when the models never disagree: few rows say little even then.

    Args:
        won, lost: rows that only the first, only the second model has right.
        n: all rows.
    """
    b, c, total = won + 0.5, lost + 0.5, n + 2.0
    delta = (b - c) / total
    half = Z95 * math.sqrt(b + c - (b - c) ** 2 / total) / total
    return delta - half, delta + half


def paired_difference(mine: Sequence[bool], theirs: Sequence[bool]) -> dict[str, float]:
    """Difference of two shares on the same rows: 95% interval, and McNemar's exact test (1947).

    The interval is a bootstrap's. Where the models differ in fewer than `FEW` rows, of which a bootstrap draws the same few again and again, it is
    widened to that of `paired_interval`.

    Returns:
        `delta` (mine - theirs), `low`, `high`, `mcnemar_p`.
    """
    import numpy as np
    from scipy.stats import binomtest

    difference = np.asarray(mine, dtype=float) - np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(0).choice(difference, (DRAWS, len(difference))).mean(axis=1)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))
    if won + lost < FEW:
        least, most = paired_interval(won, lost, len(difference))
        low, high = min(low, least), max(high, most)
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {
        "delta": float(difference.mean()),
        "low": low,
        "high": high,
        "mcnemar_p": p,
    }
