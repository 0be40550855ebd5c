"""The offline generator: labelled utterances from phrase banks and catalogs, split by phrase pattern and by product."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, get_args

from tasks.domain.bank import COUNTED, MENTION, Bank, Pattern, Product
from tasks.domain.errors import UserError
from tasks.domain.expansion import Segment, expand
from tasks.domain.noise import add_noise
from tasks.domain.scoring import normalise
from tasks.domain.spec import CatalogSlot, IntegerSlot, SlotDefault, Spec, line_of

Split = Literal["train", "validation", "test", "hard"]
SPLITS: tuple[Split, ...] = get_args(Split)
HELD_OUT_PATTERNS = 0.12  # share of an intent's patterns that only `hard` uses; at least two
# Least decoration of a pattern without placeholders. It would be the same text every time, `train` may not have what another split
# has, and the pattern would in effect be held out.
FIXED_DECORATION_RATE = 0.6
FOREIGN_RATE = 0.06  # how often one greets in another language, where everything is decorated
FOREIGN_PRODUCT_RATE = 0.06  # how often one names the product in another language, where everything is decorated
ATTEMPTS_TO_FIND = 20  # a native product that begins like one that is named otherwise
# Products by a hash of their name, the same in every language: a brand name is in one split everywhere.
PRODUCT_SHARES: tuple[tuple[Split, float], ...] = (("validation", 0.06), ("test", 0.16), ("train", 1.0))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_patterns(patterns: list[Pattern], most: int | None = None) -> dict[Split, list[Pattern]]:
    """Share out one intent's patterns.

    `hard` has patterns of its own, drawn by a hash of their text. The other splits share theirs, as in the paper's protocol (same generator, unseen
    products): what they measure is the task, and their distance to `hard` is how far the model fitted the generator.

    Args:
        most: use only the first so many of the shared patterns; a phrase bank begins with the plainest.
    """
    held_out = min(max(2, round(HELD_OUT_PATTERNS * len(patterns))), len(patterns) // 2)
    hard = sorted(patterns, key=lambda pattern: _hash(pattern.id))[:held_out]
    shared = [pattern for pattern in patterns if pattern not in hard][:most]
    return {"train": shared, "validation": shared, "test": shared, "hard": hard}


Catalog = dict[Split, list[Product]]


def split_products(products: list[Product], spec: Spec) -> Catalog:
    """Share out a catalog; the held-out departments are in `hard` only."""
    parts: Catalog = {split: [] for split in SPLITS}
    for product in products:
        position = _hash(str(normalise(product.name))) / 2**64
        drawn = next(split for split, below in PRODUCT_SHARES if position < below)
        parts["hard" if product.department in spec.held_out_departments else drawn].append(product)
    return parts


def split_catalogs(banks: Mapping[str, Bank], spec: Spec) -> dict[str, Catalog]:
    """Share out the catalogs of several languages, one of which may hold another's names.

    A product whose name holds that of a training product as whole words, or is part of one, in whichever of the languages, is in no
    evaluation split, nor in training: it would not be new to the model, and in training it would give away its name elsewhere.
    """
    catalogs = {language: split_products(bank.products, spec) for language, bank in banks.items()}
    trained = Names(form for parts in catalogs.values() for product in parts["train"] for form in product.forms.values())
    for parts in catalogs.values():
        for split in SPLITS:
            if split != "train":
                parts[split] = [product for product in parts[split] if not any(map(trained.meet, product.forms.values()))]
    return catalogs


class Names:
    """The names of products as something another name may hold or be part of, in whole words."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {words_of(name) for name in names} - {()}
        self._parts = {part for name in self._names for part in _parts(name)}
        self._longest = max(map(len, self._names), default=0)

    def meet(self, text: str) -> bool:
        """Whether a text holds one of the names, or is part of one."""
        return words_of(text) in self._parts or bool(self.held_by(text))

    def held_by(self, text: str) -> set[tuple[str, ...]]:
        """The names, as their words, that stand in a text."""
        return {part for part in _parts(words_of(text), self._longest) if part in self._names}


def words_of(text: str) -> tuple[str, ...]:
    """A text as names are looked for in it: its words, without case and what stands between them."""
    return tuple(re.findall(r"[^\W_]+", str(normalise(text))))


def _parts(words: tuple[str, ...], longest: int | None = None) -> Iterator[tuple[str, ...]]:
    """Every run of neighbouring words, of at most `longest`."""
    most = len(words) if longest is None else longest
    return (words[start:end] for start in range(len(words)) for end in range(start + 1, min(start + most, len(words)) + 1))


@dataclass(frozen=True)
class Style:
    """How much is put around and onto an utterance, and how often its numbers are drilled, see `expand`."""

    noise: tuple[str, ...]
    noise_rate: float
    decoration_rate: float
    drilled_rate: float = 0.0


class Generator:
    """Makes row `index` of a split, the same whatever was made before it.

    Args:
        banks: the phrase bank of each language to use.
        style: noise and decoration of each split.
        seed: changes every row; the split of a pattern or product never depends on it.
        most_patterns: how many patterns of an intent and language are used, besides those of `hard`.
        catalogs: of `split_catalogs`, where they are at hand.
    """

    def __init__(
        self,
        spec: Spec,
        banks: dict[str, Bank],
        style: dict[Split, Style],
        seed: int,
        intents: list[str] | None = None,
        most_patterns: int | None = None,
        catalogs: dict[str, Catalog] | None = None,
    ) -> None:
        self.spec, self.banks, self.style, self.seed = spec, banks, style, seed
        self.intents = intents or list(spec.intents)
        self._turns = [intent for intent in self.intents for _ in range(spec.intents[intent].weight)]
        catalogs = catalogs or split_catalogs(banks, spec)
        self._products = {language: dict(catalogs[language]) for language in banks}
        self._patterns = {
            language: {intent: split_patterns(bank.patterns[intent], most_patterns) for intent in self.intents}
            for language, bank in banks.items()
        }
        for language in banks:
            self._check_nothing_is_empty(language)

    def _check_nothing_is_empty(self, language: str) -> None:
        """A split without products, or without patterns of an intent, has nothing to say."""
        for split, products in self._products[language].items():
            if not products:
                where, mend = self.spec.path / "catalog" / f"{language}.csv:1", "Write more products: some hundred give each split its own"
                held_out = f", whose departments are {', '.join(self.spec.held_out_departments)}" if split == "hard" else ""
                raise UserError("catalog", str(where), f"has no product for the split {split!r}{held_out}", mend=mend)
        for intent, parts in self._patterns[language].items():
            if not all(parts.values()):
                path, problem = self.spec.path / "phrases" / f"{language}.yaml", "has a single pattern, and `hard` has patterns of its own"
                where_in_bank = f"{path}:{line_of(path, ('intents', intent))}"
                raise UserError(f"intents.{intent}", where_in_bank, problem, mend="Write at least one more")

    def extend_training(self, language: str, patterns: list[Pattern], products: list[Product]) -> None:
        """Let `train` use more patterns and products; the other splits stay as they are, so that figures stay comparable."""
        for pattern in patterns:
            if pattern.intent in self._patterns[language]:
                parts = self._patterns[language][pattern.intent]
                parts["train"] = [*parts["train"], pattern]  # a list of its own: it was shared with `test`
        parts_of_catalog = self._products[language]
        parts_of_catalog["train"] = [*parts_of_catalog["train"], *products]

    def row(self, split: Split, index: int, attempt: int = 0) -> dict[str, Any]:
        """One labelled row. Languages and intents take turns; `attempt` gives another row for the same turn."""
        languages = list(self.banks)
        language = languages[index % len(languages)]
        turns = self._turns if split == "train" else self.intents
        intent = turns[index // len(languages) % len(turns)]
        rng = Random(f"{self.seed}/{split}/{index}/{attempt}")
        pattern = rng.choice(self._patterns[language][intent][split])
        product = rng.choice(self._products[language][split])
        bank = self.banks[language]
        style = self.style[split]
        foreign_product = self._foreign(split, language, style.decoration_rate * FOREIGN_PRODUCT_RATE, rng)
        product = foreign_product or product
        drilled = bool(style.drilled_rate) and rng.random() < style.drilled_rate  # nothing is drawn where nothing is drilled
        segments, values = expand(pattern, product, bank, self.spec, rng, style.decoration_rate, drilled)
        decoration = style.decoration_rate if pattern.placeholders else max(style.decoration_rate, FIXED_DECORATION_RATE)
        foreign = rng.choice(list(self.banks.values())) if rng.random() < decoration * FOREIGN_RATE else bank
        _decorate(segments, bank, foreign, decoration, rng)
        names_product = any(
            placeholder.name in (MENTION, COUNTED) or isinstance(self.spec.slots.get(placeholder.name), CatalogSlot)
            for placeholder in pattern.placeholders
        )
        mixed = ["code_switch"] if foreign is not bank or (foreign_product and names_product) else []
        noise = mixed + add_noise(segments, list(style.noise), style.noise_rate, rng)
        text, written = _join(segments)
        return {
            "text": text,
            "gold": self._gold(intent, {**written, **values}),
            "language": language,
            "split": split,
            "origin": pattern.id,
            "product": product.name if names_product else None,
            "noise": noise,
        }

    def _foreign(self, split: Split, language: str, rate: float, rng: Random) -> Product | None:
        """Now and then a product as another language names it ("due wireless headphones"). The words around it agree with a native
        product that begins alike ("l'", "an").

        Nothing is drawn where the rate is 0: a teacher's examples, and with them what was paid for, stay what they are.
        """
        others = [other for other in self.banks if other != language]
        if not others or not rate or rng.random() >= rate:
            return None
        other = rng.choice(others)
        foreign = rng.choice(self._products[other][split])
        native = self._beginning_like(foreign.name, language, split, rng)
        return native and replace(native, department=foreign.department, forms={self.banks[other].forms[0]: foreign.name}, measures=())

    def _beginning_like(self, name: str, language: str, split: Split, rng: Random) -> Product | None:
        drawn = (rng.choice(self._products[language][split]) for _ in range(ATTEMPTS_TO_FIND))
        return next((product for product in drawn if _beginning(product.name) == _beginning(name)), None)

    def _gold(self, intent: str, values: dict[str, Any]) -> dict[str, Any]:
        gold: dict[str, Any] = {"intent": intent}
        for name, use in self.spec.intents[intent].slots.items():
            if name in values:
                gold[name] = values[name].lstrip("#") if isinstance(values[name], str) else values[name]
            elif isinstance(use, SlotDefault):
                slot = self.spec.slots[name]
                gold[name] = int(use.default) if isinstance(slot, IntegerSlot) else use.default
        return gold


def _beginning(name: str) -> str:
    """How a name begins, as far as articles care: with a vowel, with an h, which may be mute, or otherwise."""
    letter = unicodedata.normalize("NFD", name[:1].casefold())[:1]
    return letter if letter == "h" else "vowel" if letter in "aeiou" else ""


def _decorate(segments: list[Segment], bank: Bank, greeting: Bank, rate: float, rng: Random) -> None:
    """Greetings, thanks, hesitation and sentences that carry nothing, around and inside an utterance.

    Args:
        greeting: the bank of the language in which one greets and thanks, mostly the same: people mix them ("Ciao, ...", "... thx").
    """
    if greeting is not bank or rng.random() < rate * 0.5:
        segments.insert(0, Segment(rng.choice(greeting.openers) + " "))
    if rng.random() < rate * 0.4:
        segments.append(Segment(" " + rng.choice(greeting.closers)))
    if rng.random() < rate * 0.25:
        sentence = rng.choice(bank.chatter)
        if rng.random() < 0.5:
            segments.insert(0, Segment(sentence + " "))
        else:
            last = segments[-1].text.rstrip()
            segments.append(Segment(("" if last.endswith((".", "!", "?")) else ".") + " " + sentence))
    if rng.random() < rate * 0.15:
        places = [
            (segment, match.start())
            for segment in segments
            if segment.slot is None and not segment.protected
            for match in re.finditer(r" (?=\w)", segment.text)
        ]
        if places:
            segment, at = rng.choice(places)
            segment.text = f"{segment.text[:at]} {rng.choice(bank.fillers)}{segment.text[at:]}"


def _join(segments: list[Segment]) -> tuple[str, dict[str, str]]:
    """The text with single spaces, and what stands in it for each written slot."""
    text = ""
    written: dict[str, str] = {}
    for segment in segments:
        piece = re.sub(r"\s+", " ", segment.text)
        if text.endswith(" ") or not text:
            piece = piece.lstrip()
        if segment.slot:
            written[segment.slot] = piece.strip()
        text += piece
    return re.sub(r" ([,.;!?])", r"\1", text).strip(), written
