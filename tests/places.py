"""Which variables of the environment may lead tests to a store, a database, a server or a channel that is in use."""

from __future__ import annotations

import os

from tasks.core import settings

# What says how loud third parties are, which they read once, when they are imported; and how many examples fuzz tests try.
KEPT = {*settings._QUIET, "CARTWRIGHT_FUZZ_EXAMPLES"}


def is_place(name: str) -> bool:
    """Every variable of ours, of Prefect's and of MLflow's: a list of them lacked those that were added later."""
    return name.startswith(("CARTWRIGHT_", "MLFLOW_", "PREFECT_")) and name not in KEPT


def forget_places() -> None:
    for name in list(filter(is_place, os.environ)):
        del os.environ[name]
