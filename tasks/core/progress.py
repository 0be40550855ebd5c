"""How a stage says how far it is. A stage calls these functions; whoever runs it decides where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Event = dict[str, Any]


def _nobody(event: Event) -> None:
    pass


_listener: Callable[[Event], None] = _nobody


def listen(listener: Callable[[Event], None] = _nobody) -> None:
    """Send this process's events to `listener` from now on; without one, to nobody."""
    global _listener
    _listener = listener


def advance(done: int, total: int, note: str = "") -> None:
    """`done` of `total` units are finished; `note` is a short word on what is being done."""
    _listener({"done": done, "total": total, "note": note})


def metrics(values: dict[str, float], step: int) -> None:
    """Figures on the way, streamed to MLflow."""
    _listener({"metrics": values, "step": step})


def track(items: Iterable[Item], total: int, note: str = "") -> Iterator[Item]:
    """Yield `items`, reporting each as finished when the next is asked for."""
    advance(0, total, note)
    for done, item in enumerate(items, 1):
        yield item
        advance(done, total, note)
