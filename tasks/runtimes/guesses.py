"""Guesses of what a model is going to write next."""

from __future__ import annotations

REMEMBERED = 20_000  # pairs of tokens of earlier answers


class Guesses:
    """What may come next, from the prompt, which products are copied from, and from earlier answers, which are built alike.

    Speculative decoding without a second model (prompt lookup): the model reads guessed tokens in the same pass as the last one it
    wrote, and those are kept that it would have written: fewer passes for the same greedy answer, but for near ties, since a pass
    over several tokens rounds differently.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._followed: dict[tuple[int, ...], list[int]] = {}

    def after(self, prompt: list[int], written: list[int]) -> list[int]:
        """Up to `most` tokens that may follow `written`."""
        if not self._most:
            return []
        pair = tuple(written[-2:])
        return (len(pair) > 1 and self._copied(prompt, pair)) or self._followed.get(pair) or self._copied(prompt, pair[-1:])

    def _copied(self, prompt: list[int], last: tuple[int, ...]) -> list[int]:
        for end in range(len(prompt) - 1, len(last) - 1, -1):
            if tuple(prompt[end - len(last) : end]) == last:
                return prompt[end : end + self._most]
        return []

    def learn(self, written: list[int]) -> None:
        """Remember what followed what in an answer."""
        for at in range(len(written) - 1):
            if len(self._followed) < REMEMBERED:
                self._followed[tuple(written[max(0, at - 1) : at + 1])] = written[at + 1 : at + 1 + self._most]
