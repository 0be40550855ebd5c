"""What a teacher says is not believed: every item is checked, and one that fails is kept with the reason.

A validator returns the row that may join training, or the reason why none does: `wrong_schema`, `missing_slot`,
`slot_not_in_text`, `unlabelled_number`, `wrong_language`, `implausible`, `refusal`, `duplicate`, `product_of_evaluation`,
`pattern_syntax`, `unknown_placeholder`, `number_in_pattern`, `product_in_pattern`, `unknown_class`, `unknown_measure`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from tasks.domain.bank import MENTION, Bank, Node, Pattern, Product, allowed_placeholders, has_forms, make_pattern
from tasks.domain.expansion import expand
from tasks.domain.labelled import has_half_character
from tasks.domain.scoring import normalise
from tasks.domain.spec import CatalogSlot, CodeSlot, IntegerSlot, Slot, SlotDefault, Spec
from tasks.domain.utterances import Names, split_catalogs
from tasks.teaching.answers import is_refusal
from tasks.teaching.asking import Request
from tasks.teaching.language import Languages
from tasks.teaching.literals import SpeltNames, spelt
from tasks.teaching.numbers import any_number, says_number, starts_with_number

NEAR_DUPLICATE = 90.0  # rapidfuzz ratio (0..100) of normalised texts from which two count as the same
LONGEST_TEXT, LONGEST_PRODUCT, MOST_WORDS = 400, 60, 8
# A gap left open, markup, or a link: no customer's message
STAGE_PROPS = re.compile(r"[\n\r{}<>\[\]]|https?://|\b(insert|lorem ipsum|xxx+)\b", re.IGNORECASE)
CODE = re.compile(r"[\w-]{1,24}(/[\w-]{1,24})?")
COMMON = 10  # patterns from which on a word that stands before products is no part of them
EXPANSIONS = 12  # random messages of a pattern that are looked at

Judged = tuple[dict[str, Any] | None, str | None]


class Judge:
    """Checks items against the domain, the phrase banks, and everything it let pass before."""

    def __init__(self, spec: Spec, banks: Mapping[str, Bank]) -> None:
        self.spec, self.banks = spec, banks
        self._languages = Languages([*spec.languages])
        self._passed: dict[tuple[str, ...], list[str]] = {}
        parts = split_catalogs(banks, spec)
        held_out = [product for part in parts.values() for s in ("validation", "test", "hard") for product in part[s]]
        forms = {form for product in held_out for form in product.forms.values()}
        self._held_out = sorted({str(normalise(form)) for form in forms})
        self._held_out_names, self._held_out_spelt = Names(forms), {*map(spelt, forms)}
        self._names = {
            language: SpeltNames([*forms, *(form for product in bank.products for form in product.forms.values())])
            for language, bank in banks.items()
        }
        # An everyday word that some language's catalog sells ("mais") is no name where the phrase bank says it itself, and training has it.
        self._said = {language: set[str]().union(*map(self._names[language].held_by, _literals(bank))) for language, bank in banks.items()}
        self._beginnings = {language: _Beginnings(bank, spec) for language, bank in banks.items()}
        self._training_products = {language: part["train"] for language, part in parts.items()}
        for language, bank in banks.items():
            self._passed["products", language] = [str(normalise(form)) for product in bank.products for form in product.forms.values()]
            for intent, patterns in bank.patterns.items():  # also those of `hard`, which no training pattern may resemble
                self._passed["patterns", language, intent] = [_skeleton(pattern.text) for pattern in patterns]

    def judge(self, item: Any, request: Request) -> Judged:
        """One item of an answer to `request`."""
        if not isinstance(item, dict) or any(isinstance(value, dict | list) for value in item.values()):
            return None, "wrong_schema"
        if has_half_character(item):
            return None, "implausible"
        check = {"utterances": self._utterance, "patterns": self._pattern, "products": self._product}[request.kind]
        return check(item, request)

    # Utterances ----------------------------------------------------------------------------------------------------

    def _utterance(self, item: dict[str, Any], request: Request) -> Judged:
        text, uses = item.get("text"), self.spec.intents[request.topic].slots
        if not isinstance(text, str) or set(item) - {"text", "intent", *uses} or item.get("intent", request.topic) != request.topic:
            return None, "wrong_schema"
        text = " ".join(text.split())
        gold: dict[str, Any] = {"intent": request.topic}
        for name, use in uses.items():
            value = _value(item.get(name), self.spec.slots[name])
            if value is None and item.get(name) not in (None, ""):
                return None, "wrong_schema"
            if value is None and use == "always":
                return None, "missing_slot"
            if value is None and isinstance(use, SlotDefault):
                value = use.default
            if value is not None:
                gold[name] = value
        reason = self._problem_of_text(text, request) or self._problem_of_label(text, gold, request.language)
        if not reason and not self._is_new(("utterances", request.language, request.topic), text):
            reason = "duplicate"
        if reason:
            return None, reason
        return {"text": text, "gold": gold, "language": request.language, "source": request.hash, "register": request.register}, None

    def _problem_of_text(self, text: str, request: Request) -> str | None:
        if is_refusal(text):
            return "refusal"
        bare = str(normalise(text))
        fallback = self.spec.intents[request.topic].fallback
        if not text or len(text) > LONGEST_TEXT or STAGE_PROPS.search(text) or (not bare and not fallback):
            return "implausible"
        if len(bare) > 15 and any(bare in str(normalise(message["content"])) for message in request.messages):
            return "duplicate"  # of an example it was shown
        return None if self._languages.may_be(text, request.language) or fallback else "wrong_language"

    def _problem_of_label(self, text: str, gold: dict[str, Any], language: str) -> str | None:
        bank, said = self.banks[language], str(normalise(text))
        rest = said
        for name, value in gold.items():
            slot = self.spec.slots.get(name)
            if isinstance(slot, CatalogSlot | CodeSlot):
                written = str(normalise(value))
                found = re.search(rf"(?<!\w){re.escape(written)}(?!\w)", rest) if written else None
                if not found:
                    return "slot_not_in_text"
                rest = f"{rest[: found.start()]} _ {rest[found.end() :]}"
            if isinstance(slot, CatalogSlot):
                if len(value) > LONGEST_PRODUCT or len(value.split()) > MOST_WORDS or self._beginnings[language].of(value):
                    return "implausible"
                if self._is_held_out(value):
                    return "product_of_evaluation"
        if self._spelt_out((text,), language) & self._held_out_spelt:
            return "product_of_evaluation"
        return self._problem_of_numbers(rest, gold, bank)

    def _problem_of_numbers(self, rest: str, gold: dict[str, Any], bank: Bank) -> str | None:
        """Numbers that the label has and the text (without its other slots) has not, or the reverse."""
        uses = self.spec.intents[gold["intent"]].slots
        stated = False
        for name, use in uses.items():
            if isinstance(self.spec.slots[name], IntegerSlot) and name in gold:
                stated = says_number(gold[name], rest, bank)
                if not stated and gold[name] != getattr(use, "default", None):
                    return "slot_not_in_text"
        if any(isinstance(self.spec.slots[name], IntegerSlot) for name in uses) and not stated and any_number(rest, bank):
            return "unlabelled_number"
        codes = [name for name in uses if isinstance(self.spec.slots[name], CodeSlot)]
        if codes and not any(name in gold for name in codes) and re.search(r"\d{4,}", rest):
            return "unlabelled_number"
        return None

    # Patterns ------------------------------------------------------------------------------------------------------

    def _pattern(self, item: dict[str, Any], request: Request) -> Judged:
        text, bank = item.get("pattern"), self.banks[request.language]
        if not isinstance(text, str) or set(item) != {"pattern"}:
            return None, "wrong_schema"
        text = " ".join(text.split())
        if len(text) > LONGEST_TEXT:
            return None, "implausible"
        try:
            pattern = make_pattern(text, bank.language, request.topic, origin="teacher.")
        except ValueError:
            return None, "pattern_syntax"
        reason = self._problem_of_pattern(pattern, bank) or self._problem_of_expansions(pattern, bank, request)
        if not reason and not self._is_new(("patterns", request.language, request.topic), _skeleton(text)):
            reason = "duplicate"
        return (
            (None, reason)
            if reason
            else ({"language": request.language, "intent": request.topic, "text": text, "request": request.hash}, None)
        )

    def _problem_of_pattern(self, pattern: Pattern, bank: Bank) -> str | None:
        if is_refusal(pattern.text):
            return "refusal"
        allowed = allowed_placeholders(self.spec, bank, pattern.intent)
        for placeholder in pattern.placeholders:
            if placeholder.name not in allowed or (
                placeholder.form and not (has_forms(self.spec, placeholder.name) and placeholder.form in bank.forms)
            ):
                return "unknown_placeholder"
        if names := self._spelt_out(pattern.nodes, bank.language):
            return "product_of_evaluation" if names & self._held_out_spelt else "product_in_pattern"
        literal = str(normalise(re.sub(r"\{[^{}]*\}", " ", pattern.text)))
        return "number_in_pattern" if re.search(r"\d", literal) or (self._counts(pattern.intent) and any_number(literal, bank)) else None

    def _counts(self, intent: str) -> bool:
        return any(isinstance(self.spec.slots[name], IntegerSlot) for name in self.spec.intents[intent].slots)

    def _problem_of_expansions(self, pattern: Pattern, bank: Bank, request: Request) -> str | None:
        """Look at random messages of a pattern: the slots that are always there, the language, plausibility."""
        uses = self.spec.intents[pattern.intent].slots
        products = self._training_products[bank.language] or bank.products
        wrong = 0
        for number in range(EXPANSIONS):
            rng = Random(f"{pattern.id}/{number}")
            segments, values = expand(pattern, rng.choice(products), bank, self.spec, rng)
            filled = {segment.slot for segment in segments if segment.slot} | set(values)
            if any(use == "always" and name not in filled for name, use in uses.items()):
                return "missing_slot"
            text = " ".join("".join(segment.text for segment in segments).split())
            literal = " ".join(segment.text for segment in segments if not segment.slot)
            if (not normalise(literal) and not filled) or len(text) > LONGEST_TEXT or STAGE_PROPS.search(text):
                return "implausible"
            wrong += not self._languages.may_be(literal, request.language)
        return "wrong_language" if wrong > EXPANSIONS // 2 and not self.spec.intents[pattern.intent].fallback else None

    # Products ------------------------------------------------------------------------------------------------------

    def _product(self, item: dict[str, Any], request: Request) -> Judged:
        bank = self.banks[request.language]
        names = {"class", "measure", *bank.forms}
        if set(item) - names or not all(isinstance(value, str) for value in item.values()) or not {"class", bank.forms[0]} <= set(item):
            return None, "wrong_schema"
        forms = {form: " ".join(item[form].split()) for form in bank.forms if item.get(form, "").strip()}
        measures = [key for key in item.get("measure", "").split("/") if key.strip()]
        reason = self._problem_of_product(item["class"], forms, measures, bank)
        if not reason and not self._is_new(("products", request.language), forms[bank.forms[0]]):
            reason = "duplicate"
        if reason:
            return None, reason
        row = {"language": request.language, "department": request.topic, "class": item["class"], "forms": forms, "measures": measures}
        return {**row, "request": request.hash}, None

    def _problem_of_product(self, agreement: str, forms: dict[str, str], measures: list[str], bank: Bank) -> str | None:
        if any(agreement not in by_class for by_class in bank.agree.values()):
            return "unknown_class"
        if any(key not in bank.measures for key in measures):
            return "unknown_measure"
        name = forms.get(bank.forms[0], "")
        if not normalise(name):
            return "missing_slot"
        for form in forms.values():
            if is_refusal(form):
                return "refusal"
            if len(form) > LONGEST_PRODUCT or len(form.split()) > MOST_WORDS or STAGE_PROPS.search(form) or not _akin(name, form):
                return "implausible"
        if self._beginnings[bank.language].of(name) or not re.search(r"[^\W\d_]", name):
            return "implausible"
        return "product_of_evaluation" if any(self._is_held_out(form) for form in forms.values()) else None

    # Both ----------------------------------------------------------------------------------------------------------

    def _is_held_out(self, product: str) -> bool:
        from rapidfuzz import fuzz, process

        if self._held_out_names.meet(product):  # "red <one of test's>" would teach the name
            return True
        return process.extractOne(str(normalise(product)), self._held_out, scorer=fuzz.ratio, score_cutoff=NEAR_DUPLICATE) is not None

    def _spelt_out(self, nodes: tuple[Node, ...], language: str) -> set[str]:
        """Names of the language's catalog, and of all that is held out, in a text or between a pattern's placeholders."""
        return self._names[language].held_by(nodes) - self._said[language]

    def _is_new(self, cell: tuple[str, ...], text: str) -> bool:
        """Whether nothing like it passed before in its cell; if so, it counts as passed from now on."""
        from rapidfuzz import fuzz, process

        passed, bare = self._passed.setdefault(cell, []), str(normalise(text)) or text
        if process.extractOne(bare, passed, scorer=fuzz.ratio, score_cutoff=NEAR_DUPLICATE):
            return False
        passed.append(bare)
        return True


def _literals(bank: Bank) -> Iterator[tuple[Node, ...]]:
    """Everything a phrase bank says itself."""
    yield from (pattern.nodes for patterns in bank.patterns.values() for pattern in patterns)
    yield from ((text,) for text in (*bank.openers, *bank.closers, *bank.chatter, *bank.fillers))


def as_pattern(row: Mapping[str, Any]) -> Pattern:
    """A row of `patterns.jsonl` as the pattern it is."""
    return make_pattern(row["text"], row["language"], row["intent"], origin="teacher.")


def as_product(row: Mapping[str, Any]) -> Product:
    """A row of `products.jsonl` as the product it is."""
    return Product(row["department"], row["class"], row["forms"], tuple(row["measures"]))


def _value(value: Any, slot: Slot) -> Any:
    """A slot's value in the form labels have, or None if it is no value of the slot."""
    if isinstance(slot, IntegerSlot):
        return value if isinstance(value, int) and not isinstance(value, bool) and slot.minimum <= value <= slot.maximum else None
    if not isinstance(value, str) or not value.strip():
        return None
    if not isinstance(slot, CodeSlot):
        return " ".join(value.split())
    bare = value.strip().lstrip("#")
    # A word is a code only where the slot's codes may be words, and stands out: "WELCOME", not "order"
    has_digits = bool(re.search(r"\d", bare)) or (bare.isupper() and any("9" not in form for form in slot.formats))
    return bare if CODE.fullmatch(bare) and len(bare) > 1 and has_digits else None


class _Beginnings:
    """What may stand before a product and is not its name: a quantity, an article ("die Milch"), a measure of what the
    catalog has ("bottles of water")."""

    def __init__(self, bank: Bank, spec: Spec) -> None:
        self._bank = bank
        self._names = {str(normalise(form)) for product in bank.products for form in product.forms.values()}
        self._first_words = {_first_two(name) for name in self._names}  # "the" is an article, and begins "The North Face jacket"
        agreeing = {word for by_class in bank.agree.values() for word in by_class.values() if word.endswith((" ", "'"))}
        catalogs = "|".join([MENTION, *spec.slot_of_type("catalog")])
        before = re.compile(rf"(\w+) \{{(?:{catalogs})[.}}]")
        literal = Counter(word for patterns in bank.patterns.values() for pattern in patterns for word in before.findall(pattern.text))
        agreeing |= {word for word, times in literal.items() if times >= COMMON}  # "the" agrees with nothing
        measures = {measure.form(category) for measure in bank.measures.values() for category in ("other", *bank.plural)}
        self._articles = tuple(sorted({_beginning(word) for word in agreeing}))
        self._measures = tuple(sorted(_beginning(word) for word in measures))

    def of(self, product: str) -> bool:
        """Whether a product begins with one of them."""
        said = str(normalise(product)).replace("’", "'")
        measured = any(said.startswith(word) and said.removeprefix(word) in self._names for word in self._measures)
        article = said.startswith(self._articles) and _first_two(said) not in self._first_words
        return measured or article or (starts_with_number(product, self._bank))


def _first_two(name: str) -> str:
    return " ".join(name.split(" ")[:2])


def _beginning(word: str) -> str:
    """A word as texts begin with it: "bottle of " and "d'"."""
    return str(normalise(word)).rstrip("'") + ("'" if word.endswith("'") else " ")


def _skeleton(pattern: str) -> str:
    """A pattern as duplicates are looked for: without what is optional about it."""
    return str(normalise(re.sub(r"[\[\]()|]", " ", re.sub(r"\{(\w+)[^{}]*\}", r"\1", pattern))))


def _akin(name: str, form: str) -> bool:
    """Whether a form may be an inflection of a name: half of the letters the same, umlauts and endings aside."""
    from rapidfuzz import fuzz

    return fuzz.ratio(str(normalise(name)), str(normalise(form))) >= 50
