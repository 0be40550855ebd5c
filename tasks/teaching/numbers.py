"""Numbers in a text, in digits or in the words of a phrase bank."""

from __future__ import annotations

import itertools
import re

from tasks.domain.bank import Bank
from tasks.domain.scoring import normalise

TOGETHER = re.compile(r"-| | (and|und|et|y|e|i) ")


def _number_words(bank: Bank, number: int) -> set[str]:
    words: set[str] = set(bank.bare_numbers.get(number, []))
    for word in bank.numbers.get(number, []):
        words |= {word} if isinstance(word, str) else set(word.values())
    return {str(normalise(word)) for word in words if word}


def numbers_said(text: str, bank: Bank) -> set[int]:
    """The numbers that a (normalised) text states, in digits or as whole words, also with something behind them ("2x", "zweimal").

    Of words that begin alike the longest counts: "twenty-four" is no 20, "vierzehn" no 4. Words that stand together ("forty-two",
    "quarante et un") are parts of a number for which the bank has no word; none of them counts.
    """
    meant: dict[str, set[int]] = {}
    for number in {*bank.numbers, *bank.bare_numbers}:
        for word in _number_words(bank, number):
            meant.setdefault(word, set()).add(number)
    said = {int(digits) for digits in re.findall(r"(?<![\w.,])(\d{1,9})(?!\d|[.,]\d)", text)}
    if meant:
        longest_first = "|".join(re.escape(word) for word in sorted(meant, key=len, reverse=True))
        found = list(re.finditer(rf"(?<!\w)({longest_first})(?:mal|x)?(?!\w)", text))
        together = {
            match for pair in itertools.pairwise(found) if TOGETHER.fullmatch(text, pair[0].end(), pair[1].start()) for match in pair
        }
        said |= {number for match in found if match not in together for number in meant[match[1]]}
    return said


def says_number(number: int, text: str, bank: Bank) -> bool:
    """Whether a (normalised) text states a number, see `numbers_said`."""
    return number in numbers_said(text, bank)


def any_number(text: str, bank: Bank) -> bool:
    """Whether a (normalised) text states a number other than one, or a part of one, or has digits at all that are not a 1."""
    words = {word for number in {*bank.numbers, *bank.bare_numbers} if number > 1 for word in _number_words(bank, number)}
    found = re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?:mal|x)?(?!\w)", text) if words else None
    return bool(found) or any(int(digits) != 1 for digits in re.findall(r"\d+", text))


def starts_with_number(product: str, bank: Bank) -> bool:
    """Whether a product begins with a quantity ("2 apples"); a number that belongs to a name ("7 Up") cannot be told from it."""
    first = str(normalise(product)).split(" ")[0]
    return first.isdigit() or any(first in _number_words(bank, number) for number in {*bank.numbers, *bank.bare_numbers})
