"""Numbers in a text, in digits or in the words of a phrase bank."""

from __future__ import annotations

import re

from tasks.domain.bank import Bank
from tasks.domain.scoring import normalise


def _number_words(bank: Bank, number: int) -> set[str]:
    words: set[str] = set(bank.bare_numbers.get(number, []))
    for word in bank.numbers.get(number, []):
        words |= {word} if isinstance(word, str) else set(word.values())
    return {str(normalise(word)) for word in words if word}


def says_number(number: int, text: str, bank: Bank) -> bool:
    """Whether a (normalised) text states a number, in digits or as a word, also with something behind it ("2x", "zweimal")."""
    words = "|".join(map(re.escape, _number_words(bank, number)))
    return bool(re.search(rf"(?<![\w.,]){number}(?!\d)" + (rf"|(?<!\w)(?:{words})" if words else ""), text))


def any_number(text: str, bank: Bank) -> bool:
    """Whether a (normalised) text states a number above one."""
    words = {word for number in {*bank.numbers, *bank.bare_numbers} if number > 1 for word in _number_words(bank, number)}
    found = re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", text) if words else None
    return bool(found or any(int(digits) != 1 for digits in re.findall(r"\d+", text)))


def starts_with_number(product: str, bank: Bank) -> bool:
    """Whether a product begins with a quantity ("2 apples"); a number that belongs to a name ("7 Up") cannot be told from it."""
    first = str(normalise(product)).split(" ")[0]
    return first.isdigit() or any(first in _number_words(bank, number) for number in {*bank.numbers, *bank.bare_numbers})
