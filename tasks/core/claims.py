"""A lock that hosts share through MLflow, whose tags and aliases have no compare-and-swap."""

from __future__ import annotations

import time
import uuid
from types import TracebackType
from typing import Any

from tasks.core.flat import TAG

SETTLE_S = 2.0  # longer than it takes until what one host has written is what another reads
ABANDONED_S = 600.0  # longer than a promotion, which loads a model from the registry


class Claim:
    """Held by one host at a time: a tag on a registered model, which names who holds it.

    Fischer's algorithm (in L. Lamport, A Fast Mutual Exclusion Algorithm, ACM TOCS 5(1), 1987, doi:10.1145/7351.7352): who finds no claim
    writes its own, waits until all who found none with it must have written theirs, and has it if it is still there. A host that died with
    the claim is waited for as long as nobody can have held it; clocks of hosts are not compared.

    Args:
        client: of MLflow.
        model: name of the registered model; it must exist.
        owner: who claims, where nobody else claims by that name at the same time. What it left behind when it died is its own again.
    """

    def __init__(self, client: Any, model: str, owner: str, settle_s: float = SETTLE_S, abandoned_s: float = ABANDONED_S) -> None:
        self._client, self._model, self._owner = client, model, owner
        self._settle_s, self._abandoned_s = settle_s, abandoned_s
        self._tag = TAG + "promoting"
        self._mine = f"{owner} {uuid.uuid4().hex}"

    def holds(self) -> bool:
        """Whether the claim still is ours."""
        return self._there() == self._mine

    def _there(self) -> str:
        return str(self._client.get_registered_model(self._model).tags.get(self._tag, ""))

    def _write(self, there: str) -> None:
        try:
            self._client.set_registered_model_tag(self._model, self._tag, self._mine)
        except Exception:
            if self._there() in ("", there):
                raise
            # Another wrote at the same moment: of two new tags the database takes one, and calls the other an error.

    def __enter__(self) -> Claim:
        seen, since = "", time.monotonic()
        while True:
            there = self._there()
            if there != seen:
                seen, since = there, time.monotonic()
            if not there or there.rpartition(" ")[0] == self._owner or time.monotonic() - since > self._abandoned_s:
                self._write(there)
                time.sleep(self._settle_s)
                if self.holds():
                    return self
            else:
                time.sleep(self._settle_s / 4)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.holds():
            self._client.delete_registered_model_tag(self._model, self._tag)
