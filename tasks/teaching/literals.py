"""Names of products that a text, or a phrase pattern between its placeholders, spells out."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable

from tasks.domain.bank import Choice, Node, Placeholder
from tasks.domain.utterances import words_of


class SpeltNames:
    """Finds names in whole words, through every way to say a pattern: "(chicken|beef) breast[s]" says four.

    Ways are not written out, of which a pattern may have millions: what is followed is the names that have begun.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {f"{spelt(name)} " for name in names} - {" "}  # the space: a name ends where its last word does
        self._sorted = sorted(self._names)

    def held_by(self, nodes: tuple[Node, ...]) -> set[str]:
        """The names, as `spelt`, that a pattern or a text (a pattern of one node) may say."""
        found = set[str]()
        self._follow((*nodes, " "), {""}, found)
        return {name[:-1] for name in found}

    def _follow(self, nodes: tuple[Node, ...], begun: set[str], found: set[str]) -> set[str]:
        """What may have begun behind the nodes; `""` where a word may begin."""
        for node in nodes:
            if isinstance(node, Choice):
                begun = set[str]().union(*(self._follow(option, begun, found) for option in node.options))
            elif isinstance(node, Placeholder):  # some have the space behind them in what they stand for
                self._after(" ", begun, found)
                begun = {""}
            else:
                for character in _plain(node):
                    begun = self._after(character, begun, found)
        return begun

    def _after(self, character: str, begun: set[str], found: set[str]) -> set[str]:
        if character != " ":
            return {longer for name in begun if self._begins(longer := name + character)}
        ended = {name if name.endswith(" ") or not name else f"{name} " for name in begun}
        found |= ended & self._names
        return {name for name in ended if self._begins(name)} | {""}

    def _begins(self, start: str) -> bool:
        place = bisect_left(self._sorted, start)
        return place < len(self._sorted) and self._sorted[place].startswith(start)


def spelt(name: str) -> str:
    """A name as `SpeltNames` gives it: its words, without case and what stands between them."""
    return " ".join(words_of(name))


def _plain(text: str) -> str:
    """A part of a pattern as its names are spelt; unlike a whole text it may begin or end within a word, or between two."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()))
