"""Which requests are asked, and in which order: the first so many of an endless list, so that a longer plan begins like a shorter one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from tasks.domain.bank import Bank, Product, allowed_placeholders
from tasks.domain.spec import Spec
from tasks.domain.utterances import Generator, Split, Style, split_catalogs, split_patterns
from tasks.teaching.asking import Request
from tasks.teaching.prompts import PROMPT_VERSION, REGISTERS, ask_patterns, ask_products, ask_utterances

TURNS = ("utterances", "patterns", "utterances", "products", "utterances", "patterns")
EXAMPLES, PRODUCT_NAMES = 5, 8
# Tokens an answer may have: what its items need in a language that tokenizes badly.
TOKENS_PER_ITEM = {"utterances": 110, "patterns": 90, "products": 260}
PLAIN: dict[Split, Style] = {"train": Style((), 0.0, 0.0)}


def make_plan(
    spec: Spec, banks: Mapping[str, Bank], intents: Sequence[str], model: str, requests: int, items: int, temperature: float
) -> list[Request]:
    """The first `requests` requests. Kinds, languages, intents (or departments) and registers take turns.

    All that a teacher is shown is of the training split: what `hard` and `test` hold out stays unknown to it.
    """
    writer = _Writer(spec, banks, items)
    planned: list[Request] = []
    times: Counter[tuple[str, ...]] = Counter()
    for turn in _turns(list(banks), list(intents), [d for d in spec.departments if d not in spec.held_out_departments]):
        if len(planned) == requests:
            break
        kind, language, topic, register = turn
        messages, response_format = writer.write(kind, language, topic, register, times[turn])
        times[turn] += 1
        parameters = {
            "temperature": temperature,
            "max_tokens": 200 + items * TOKENS_PER_ITEM[kind],
            "response_format": response_format,
        }
        planned.append(Request(kind, language, topic, register, tuple(messages), parameters, model, PROMPT_VERSION))
    return planned


def _turns(languages: list[str], intents: list[str], departments: list[str]) -> Iterator[tuple[str, str, str, str]]:
    registers = list(REGISTERS)
    counts: Counter[str] = Counter()
    while True:
        for kind in TURNS:
            number = counts[kind]
            counts[kind] += 1
            place, round_ = number % len(languages), number // len(languages)
            topics = departments if kind == "products" else intents
            lap, topic = divmod(round_ + place * len(topics) // len(languages), len(topics))  # each language begins elsewhere
            register = "" if kind == "products" else registers[(round_ + 3 * place + lap) % len(registers)]
            yield kind, languages[place], topics[topic], register


class _Writer:
    """Writes the messages of a request, with examples of its language and topic."""

    def __init__(self, spec: Spec, banks: Mapping[str, Bank], items: int) -> None:
        self.spec, self.banks, self.items = spec, banks, items
        self.catalogs = split_catalogs(banks, spec)
        self.products = {language: catalog["train"] for language, catalog in self.catalogs.items()}

    def write(self, kind: str, language: str, topic: str, register: str, times: int) -> tuple[list[dict[str, str]], dict[str, Any]]:
        bank, spec = self.banks[language], self.spec
        if kind == "products":
            same = [product for product in self.products[language] if product.department == topic]
            return ask_products(spec, bank, topic, self.items, _varied(same or self.products[language]), times)
        if kind == "patterns":
            patterns = [pattern.text for pattern in split_patterns(bank.patterns[topic])["train"]]
            allowed = sorted(allowed_placeholders(spec, bank, topic))
            return ask_patterns(spec, bank, topic, register, self.items, allowed, _spread(patterns, EXAMPLES), times)
        one = Generator(spec, {language: bank}, PLAIN, 0, [topic], catalogs=self.catalogs)
        examples = [one.row("train", index) for index in range(EXAMPLES)]
        names = [product.name for product in self.products[language]]
        shown = Random(f"{language}/{topic}/{register}/{times}").sample(names, min(PRODUCT_NAMES, len(names)))
        return ask_utterances(spec, language, topic, register, self.items, shown, examples, times)


def _spread(values: Sequence[str], count: int) -> list[str]:
    """`count` values from all over a list."""
    return [values[i * len(values) // count] for i in range(min(count, len(values)))] if len(values) > count else list(values)


def _varied(products: Sequence[Product]) -> list[Product]:
    """Up to `EXAMPLES` products, as many inflection classes as there are first."""
    first = list({product.agreement: product for product in products}.values())
    return (first + [product for product in products if product not in first])[:EXAMPLES]
