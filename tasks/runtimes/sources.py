"""Where the conversations come from that a runtime answers several at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass
class Asked:
    """A conversation to be answered, and the most tokens of its answer. `gone`: nobody waits for it any more."""

    index: int
    prompt: list[int]
    max_tokens: int
    gone: bool = False


class Source(Protocol):
    """Where conversations come from: a list, or requests as they arrive."""

    def take(self, wait: bool) -> Asked | None:
        """The next conversation; None if there is none at the moment. With `wait` None means that there will be none any more."""
        ...

    def refuse(self, asked: Asked, problem: str) -> None:
        """What was taken can never be answered."""
        ...


class Listed:
    """Conversations that are all there from the beginning."""

    def __init__(self, asked: list[Asked]) -> None:
        self._asked = asked[::-1]

    def take(self, wait: bool) -> Asked | None:
        return self._asked.pop() if self._asked else None

    def refuse(self, asked: Asked, problem: str) -> None:
        raise ValueError(f"conversation {asked.index} {problem}")
