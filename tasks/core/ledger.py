"""Where the time of a run goes: from the start of its process on, each moment is charged to one account, so that nothing counts twice.

A run has one thread that works; what others do beside it takes it no time. Where no run has begun, charging does nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import psutil

Account = Literal["start", "stages", "processes", "store", "prefect", "mlflow", "report"]
ACCOUNTS: tuple[Account, ...] = get_args(Account)


class Ledger:
    """Seconds by account. What nothing else is charged with is Prefect's: its flows are around all the rest.

    Args:
        begun: when the run's time began, by the monotonic clock. What has passed since then was the start.
    """

    def __init__(self, begun: float) -> None:
        self._since = time.monotonic()
        self._spent = dict.fromkeys(ACCOUNTS, 0.0) | {"start": self._since - begun}
        self._account: Account = "prefect"
        self._thread = threading.get_ident()

    def switch(self, account: Account) -> Account:
        """Charge this account from now on; the one that was charged until now."""
        now = time.monotonic()
        self._spent[self._account] += now - self._since
        before, self._account, self._since = self._account, account, now
        return before

    def takes(self) -> bool:
        """Whether what happens now can be charged. While a process is waited for, only that is: it works beside whatever we do."""
        return threading.get_ident() == self._thread and self._account != "processes"

    def split(self) -> dict[Account, float]:
        """Seconds of each account until now."""
        self.switch(self._account)
        return {account: self._spent[account] for account in ACCOUNTS}

    def move(self, source: Account, to: Mapping[Account, float]) -> None:
        """Charge others with some of what a source was charged with; all of it at most, and nothing if they claim more."""
        if sum(to.values()) <= self.split()[source]:
            for account, seconds in to.items():
                self._spent[source] -= seconds
                self._spent[account] += seconds


_ledger: Ledger | None = None


def begin() -> None:
    """A run begins. The first of a process began with the process, whose imports were for it."""
    global _ledger
    age = 0.0 if _ledger else max(0.0, time.time() - psutil.Process().create_time())
    _ledger = Ledger(time.monotonic() - age)


@contextmanager
def charge(account: Account) -> Iterator[None]:
    """Charge an account with what happens within, except what within that is charged to others. Decorates functions, too."""
    ledger = _ledger
    if ledger is None or not ledger.takes():
        yield
        return
    before = ledger.switch(account)
    try:
        yield
    finally:
        ledger.switch(before)


def split() -> dict[Account, float]:
    """Seconds of each account until now, of the run that is under way; zeros without one."""
    return _ledger.split() if _ledger else dict.fromkeys(ACCOUNTS, 0.0)


def waited_for(seconds: Mapping[Account, float]) -> None:
    """Tell how a process that was waited for spent its time. What is left of the wait was for its start and its end."""
    if _ledger:
        _ledger.move("processes", seconds)
