"""Two models on the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def correct_rows(folder: Path) -> list[bool]:
    """Which rows of `test` an evaluation got right."""
    with (folder / "test.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["correct"] for line in file]


def paired_difference(mine: Sequence[bool], theirs: Sequence[bool], draws: int = 2000) -> dict[str, float]:
    """Difference of two shares on the same rows: bootstrap 95% interval, and McNemar's exact test (1947).

    Returns:
        `delta` (mine - theirs), `low`, `high`, `mcnemar_p`.
    """
    import numpy as np
    from scipy.stats import binomtest

    difference = np.asarray(mine, dtype=float) - np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(0).choice(difference, (draws, len(difference))).mean(axis=1)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {
        "delta": float(difference.mean()),
        "low": float(np.quantile(drawn, 0.025)),
        "high": float(np.quantile(drawn, 0.975)),
        "mcnemar_p": p,
    }
