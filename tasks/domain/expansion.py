"""One phrase pattern as one labelled utterance: which alternatives, which product, which numbers and codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from tasks.domain.bank import ANY, COUNTED, DIGITS, MENTION, OTHER, SIZE, Bank, Choice, Node, Pattern, Placeholder, Product
from tasks.domain.spec import CatalogSlot, CodeSlot, IntegerSlot, Spec

# How often each is ordered: mostly a few, large ones seldom and round; the seldom ones often enough for their words to be learnt.
QUANTITIES = [number for number, times in {
    1: 5, 2: 8, 3: 7, 4: 6, 5: 5, 6: 5, 7: 4, 8: 4, 9: 3, 10: 5, 11: 2, 12: 4, 13: 1, 14: 1, 15: 3, 16: 1, 18: 1, 20: 3, 24: 2, 25: 1, 30: 2,
    40: 1, 50: 2, 100: 1
}.items() for _ in range(times)]  # fmt: skip
LARGE = range(25, 505, 5)  # what offices order; numbers that end in 0 or 5 take one plural form in every language
LARGE_SHARE = 0.08
# How often a product gets an attribute more, and a number or code is first said wrongly, where variety is 1.
ATTRIBUTE_RATE, CORRECTION_RATE = 0.5, 0.15
SECOND_ATTRIBUTE_RATE = 0.2  # of those that get one: "black, size 42"


@dataclass
class Segment:
    """A piece of an utterance; `slot` names the slot whose value it is, if it is one."""

    text: str
    slot: str | None = None
    protected: bool = False  # numbers and codes: noise must not change what they say


@dataclass
class _Utterance:
    """What holds for all of one utterance."""

    product: Product
    bank: Bank
    spec: Spec
    rng: Random
    attribute: str
    corrected: bool
    number: int
    drilled: bool  # said in words wherever the pattern and the bank have words
    counts: bool = False  # the number was said, so it is a label

    def named(self, form: str | None) -> str:
        return self.product.form(form) + self.attribute


def expand(
    pattern: Pattern, product: Product, bank: Bank, spec: Spec, rng: Random, variety: float = 0.0, drilled: bool = False
) -> tuple[list[Segment], dict[str, Any]]:
    """Expand one pattern into the segments of an utterance and the values of its integer slots.

    Args:
        variety: from 0 to 1; how readily products get attributes ("in blue"), and people correct themselves ("two, no, three").
        drilled: numbers are drawn from those of the bank's `numbers`, an entry as likely as another, not as often as people order so
            many, and said in words, but for those that a pattern wants in digits.
    """
    attribute = _attribute(product, bank, rng) if rng.random() < variety * ATTRIBUTE_RATE else ""
    corrected = bool(bank.corrections) and rng.random() < variety * CORRECTION_RATE
    number = _number_with_a_word(spec, bank, rng) if drilled else _number(spec, rng)
    said = _Utterance(product, bank, spec, rng, attribute, corrected, number, drilled)
    segments = [segment for node in list(_choose(pattern.nodes, rng)) for segment in _render(node, said)]
    return segments, {spec.slot_of_type("integer")[0]: said.number} if said.counts else {}


def _attribute(product: Product, bank: Bank, rng: Random) -> str:
    """One or two attributes of a product's department, with a space before each; sizes are mostly small numbers."""
    known = list(dict.fromkeys([*bank.attributes.get(product.department, []), *bank.attributes.get(ANY, [])]))
    wanted = 2 if rng.random() < SECOND_ATTRIBUTE_RATE else 1
    chosen = rng.sample(known, min(wanted, len(known)))
    return "".join(" " + re.sub(re.escape(SIZE), lambda _: str(round(2 * 250 ** rng.random())), text) for text in chosen)


def _choose(nodes: tuple[Node, ...], rng: Random) -> Iterator[str | Placeholder]:
    for node in nodes:
        if isinstance(node, Choice):
            yield from _choose(rng.choice(node.options), rng)
        else:
            yield node


def _render(node: str | Placeholder, said: _Utterance) -> list[Segment]:
    if isinstance(node, str):
        return [Segment(node)]
    name, bank = node.name, said.bank
    if name in bank.agree:
        return [Segment(bank.agree[name][said.product.agreement])]
    if name == MENTION:
        return [Segment(said.named(node.form))]
    if name == OTHER:
        return [_bare_number(_other_number(said), said)]
    if name == COUNTED:
        return _counted(said)
    slot = said.spec.slots.get(name)
    if isinstance(slot, CatalogSlot):
        return [Segment(said.named(node.form), name)]
    if isinstance(slot, CodeSlot):
        code = Segment(_code(said.rng.choice(slot.formats), bank, said.rng), name, protected=True)
        wrong = Segment(_code(said.rng.choice(slot.formats), bank, said.rng), protected=True)
        return [*_taken_back(wrong, said), code]
    said.counts = True
    words: list[str] | None = [] if name == DIGITS else None
    return [*_taken_back(_bare_number(_other_number(said), said, words), said), _bare_number(said.number, said, words)]


def _taken_back(wrong: Segment, said: _Utterance) -> list[Segment]:
    """What is said first by someone who corrects himself; only once in an utterance."""
    if not said.corrected:
        return []
    said.corrected = False
    return [wrong, Segment(f" {said.rng.choice(said.bank.corrections)} ")]


def _number(spec: Spec, rng: Random) -> int:
    slots = [slot for slot in spec.slots.values() if isinstance(slot, IntegerSlot)]
    number = rng.choice(LARGE) if rng.random() < LARGE_SHARE else rng.choice(QUANTITIES)
    return min(max(number, slots[0].minimum), slots[0].maximum) if slots else number


def _number_with_a_word(spec: Spec, bank: Bank, rng: Random) -> int:
    slots = [slot for slot in spec.slots.values() if isinstance(slot, IntegerSlot)]
    numbers = [number for number, words in bank.numbers.items() for _ in words]
    allowed = [number for number in numbers if all(slot.minimum <= number <= slot.maximum for slot in slots)]
    return rng.choice(allowed) if allowed else _number(spec, rng)


def _other_number(said: _Utterance) -> int:
    # Drawn as the quantity is: a number that is only ever the quantity would be taken for it wherever it stands.
    if said.drilled and (other := _number_with_a_word(said.spec, said.bank, said.rng)) != said.number:
        return other
    return said.rng.choice([number for number in QUANTITIES if number != said.number])


def _bare_number(number: int, said: _Utterance, words: list[str] | None = None) -> Segment:
    """A number on its own, as a word or in digits; `words` are those to choose from, else the bank's."""
    known = said.bank.bare_numbers.get(number) if words is None else words
    if not known or (not said.drilled and said.rng.random() < 0.5):
        return Segment(str(number), protected=True)
    return Segment(said.rng.choice(known))


def _counted(said: _Utterance) -> list[Segment]:
    """Number, measure word and product, agreeing with each other."""
    product, bank, rng = said.product, said.bank, said.rng
    said.counts = True
    taken_back = _taken_back(_bare_number(_other_number(said), said), said)
    category = bank.category(said.number)
    form = bank.counted.get(category, bank.counted["other"])
    mass_noun = bool(product.measures) and bank.counted["other"] not in product.forms
    segments, agreement = [], product.agreement
    if product.measures and (mass_noun or rng.random() < 0.5):
        measure = bank.measures[rng.choice(product.measures)]
        agreement, form = measure.agreement, bank.measured
        segments.append(Segment(" " + measure.form(category), protected=True))
    words = bank.numbers.get(said.number)
    if words and (said.drilled or rng.random() < 0.5):
        word = rng.choice(words)
        text = word if isinstance(word, str) else word.get(agreement, next(iter(word.values())))
        count = Segment(text)
    else:
        count = Segment(str(said.number), protected=True)
    catalog = said.spec.slot_of_type("catalog")[0]
    # "bouteille d'" joins the product without a space
    space = "" if segments and segments[0].text.endswith("'") else " "
    return [*taken_back, count, *segments, Segment(space), Segment(said.named(form), catalog)]


def _code(form: str, bank: Bank, rng: Random) -> str:
    before, word, after = form.partition("{word}")
    filled = [
        re.sub(r"9|A", lambda m: str(rng.randrange(10)) if m.group() == "9" else rng.choice("ABCDEFGHJKLMNPRSTUVWX"), part)
        for part in (before, after)
    ]
    if filled[0].startswith("0") and not word:
        filled[0] = str(rng.randrange(1, 10)) + filled[0][1:]
    return filled[0] + (rng.choice(bank.coupon_words) if word else "") + filled[1]
