"""What a run cost beside the work of its stages: the `overhead` of the report."""

from __future__ import annotations

from typing import Any

from tasks.core import ledger
from tasks.core.ledger import Account

WORDS: dict[Account, str] = {
    "stages": "Work of stages, and asking the model that is promoted",
    "start": "Start: imports, Prefect's server, opening MLflow",
    "processes": "Starting and ending processes of stages (with pools: all that a worker does beside stages)",
    "store": "Store: looking up, hashing and verifying artefacts, locks, manifests",
    "prefect": "Prefect: flow runs, task runs, their states",
    "mlflow": "MLflow: runs, metrics, models, registry",
    "report": "Report, until its pages are written",
}


def overhead() -> dict[str, Any]:
    """Where the time has gone until now, in seconds by account, `<account>_s`; they add up to `wall_s`, which begins with the process.

    `total_s` is all but the work of stages, `share` its share of `wall_s`.
    """
    spent = {account: round(seconds, 3) for account, seconds in ledger.split().items()}
    wall = sum(spent.values())
    total = wall - spent["stages"]
    sums = {"wall_s": round(wall, 3), "total_s": round(total, 3), "share": total / wall if wall else None}
    return {**{f"{account}_s": spent[account] for account in WORDS}, **sums}


def since(report: dict[str, Any]) -> float:
    """Seconds that have passed since a report of this process counted, which no report can hold."""
    return sum(ledger.split().values()) - float(report["overhead"]["wall_s"])


def rows(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The `overhead` of a report as rows of a table: where, seconds, share."""
    if not found:
        return []
    wall = found["wall_s"] or 1
    named = [(words, found[f"{account}_s"]) for account, words in WORDS.items()] + [("All but the work of stages", found["total_s"])]
    return [{"where": words, "seconds": seconds, "share": seconds / wall} for words, seconds in named]
