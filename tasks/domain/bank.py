"""Phrase banks and catalogs: reading and checking.

A pattern is a line such as `"[please] (put|add) {counted} to my cart"`: `[x]` is optional, `(a|b)` one of, `{name}` a
placeholder. `tasks/domain/README.md` has the whole format.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.domain.errors import UserError
from tasks.domain.files import read_text
from tasks.domain.spec import LARGEST_FILE, CatalogSlot, IntegerSlot, Spec, Text, explained, line_of, load_yaml

OTHER = "other"  # a number that is not the quantity, and no label
MENTION = "mention"  # a product that is no label: a near miss of an intent without product slot
COUNTED = "counted"  # number, measure word and product, agreeing with each other
DIGITS = "digits"
ANY = "any"  # attributes that fit every department
SIZE = "{n}"  # in an attribute: any whole number from 2 to 500
DEEPEST = 10  # brackets within brackets in a pattern


@dataclass(frozen=True)
class Placeholder:
    name: str
    form: str | None = None


@dataclass(frozen=True)
class Choice:
    """One of several sequences; an optional part is a choice between itself and nothing."""

    options: tuple[tuple[Node, ...], ...]


Node = str | Placeholder | Choice


@dataclass(frozen=True)
class Pattern:
    """One line of a phrase bank. `id` depends on language, intent and text only, so it survives reordering."""

    id: str
    intent: str
    text: str
    nodes: tuple[Node, ...] = field(compare=False)

    @functools.cached_property
    def placeholders(self) -> list[Placeholder]:
        return list(_placeholders(self.nodes))


@dataclass(frozen=True)
class Product:
    """One row of a catalog: its inflected forms, the class words agree with, and the measure words it is sold by."""

    department: str
    agreement: str
    forms: dict[str, str] = field(compare=False, hash=False)
    measures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return next(iter(self.forms.values()))

    def form(self, name: str | None) -> str:
        return (self.forms.get(name) if name else None) or self.name


class _Measure(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")
    agreement: str = Field(alias="class")
    __pydantic_extra__: dict[str, str]

    @model_validator(mode="after")
    def _has_a_form(self) -> _Measure:
        if not self.model_extra:
            raise ValueError("has no form; write at least `other`")
        return self

    def form(self, category: str) -> str:
        extra = self.model_extra or {}
        return extra.get(category) or extra.get("other") or next(iter(extra.values()))


Word = str | dict[str, str]


class Bank(BaseModel):
    """The phrase bank of one language, as read from `phrases/<language>.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    language: str
    forms: list[str] = Field(min_length=1)
    plural: dict[str, list[int]]
    counted: dict[str, str]
    measured: str
    agree: dict[str, dict[str, str]]
    measures: dict[str, _Measure]
    numbers: dict[int, list[Word]]
    bare_numbers: dict[int, list[str]]
    openers: list[str] = Field(min_length=1)
    closers: list[str] = Field(min_length=1)
    chatter: list[str] = Field(min_length=1)
    fillers: list[str] = Field(min_length=1)
    coupon_words: list[str] = Field(min_length=1)
    attributes: dict[str, list[str]] = {}
    corrections: list[str] = []
    intents: dict[str, list[str]]
    patterns: dict[str, list[Pattern]] = {}
    products: list[Product] = []

    def category(self, number: int) -> str:
        """The plural category of a number: the first that lists it, else `other`."""
        return next((name for name, numbers in self.plural.items() if number in numbers), "other")


# --- reading -----------------------------------------------------------------------------------------------------


def load_bank(spec: Spec, language: str) -> Bank:
    """Read and check one language's phrase bank and catalog.

    Raises:
        UserError: a missing or malformed file, an unknown placeholder, form, class, measure or department; file and line named.
    """
    path = spec.path / "phrases" / f"{language}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError("languages", language, f"has no phrase bank {path}", allowed=known, mend="Write one or leave the language out")
    raw = load_yaml(path)
    try:
        bank = Bank.model_validate(raw)
    except ValidationError as error:
        raise explained(error, path) from None
    _check_words(bank, spec, path)
    for department in bank.attributes:
        if department not in (ANY, *spec.departments):
            where = f"{path}:{line_of(path, ('attributes', department))}"
            raise UserError("attributes", where, f"department {department!r} is unknown", allowed=[ANY, *spec.departments])
        for number, attribute in enumerate(bank.attributes[department]):
            if re.search(r"[{}]", attribute.replace(SIZE, "")):
                where = f"{path}:{line_of(path, ('attributes', department, number))}"
                raise UserError("attributes", where, f"{attribute!r} has an unknown placeholder", allowed=[SIZE])
    products = _load_catalog(spec, bank, spec.path / "catalog" / f"{language}.csv")
    patterns = {intent: _load_patterns(spec, bank, raw["intents"].get(intent, []), intent, path) for intent in spec.intents}
    for intent in bank.intents:
        if intent not in spec.intents:
            where = f"{path}:{line_of(path, ('intents', intent))}"
            raise UserError("intents", where, f"{intent!r} is not an intent of {spec.name}", allowed=list(spec.intents))
    return bank.model_copy(update={"patterns": patterns, "products": products})


def _check_words(bank: Bank, spec: Spec, path: Path) -> None:
    """What the fields of a bank say of each other, and of the numbers that the domain knows."""

    def refuse(location: tuple[str | int, ...], problem: str, allowed: list[str] | None = None) -> None:
        mend = "" if allowed else "Mend that field"
        raise UserError(".".join(map(str, location)), f"{path}:{line_of(path, location)}", problem, allowed=allowed, mend=mend)

    if bank.language != path.stem:
        refuse(("language",), f"is {bank.language!r} in the phrase bank of {path.stem!r}", [path.stem])
    if "other" not in bank.counted:
        refuse(("counted",), "has no form for `other`, the numbers that are in no category of `plural`", [f"other: one of {bank.forms}"])
    for category, form in bank.counted.items():
        if category not in ("other", *bank.plural):
            refuse(("counted", category), f"category {category!r} is unknown", ["other", *bank.plural])
        if form not in bank.forms:
            refuse(("counted", category), f"form {form!r} is unknown", bank.forms)
    if bank.measured not in bank.forms:
        refuse(("measured",), f"form {bank.measured!r} is unknown", bank.forms)
    said: list[tuple[str, int, list[Any]]] = [("numbers", number, words) for number, words in bank.numbers.items()]
    for field_, number, words in said + [("bare_numbers", number, words) for number, words in bank.bare_numbers.items()]:
        if not words or not all(word and all(word.values()) if isinstance(word, dict) else word for word in words):
            refuse((field_, number), "has no word, or one that is empty")
        for name, slot in spec.slots.items():
            if isinstance(slot, IntegerSlot) and not slot.minimum <= number <= slot.maximum:
                refuse((field_, number), f"is a number that {name} cannot be", [f"{slot.minimum} to {slot.maximum}, as spec.yaml has it"])
    classes = {name for by_class in bank.agree.values() for name in by_class}
    for name, measure in bank.measures.items():
        for category in measure.model_extra or {}:
            if category not in ("other", *bank.plural):
                refuse(("measures", name, category), f"category {category!r} is unknown", ["other", *bank.plural])
        if classes and measure.agreement not in classes:
            refuse(("measures", name, "class"), f"class {measure.agreement!r} is unknown", sorted(classes))


def _load_catalog(spec: Spec, bank: Bank, path: Path) -> list[Product]:
    header = ["department", "class", *bank.forms, "measure"]
    products, seen = [], set[str]()
    if not path.is_file():
        raise UserError("file", str(path), "does not exist", mend=f"Write it with the columns {','.join(header)}")
    reader = csv.reader(io.StringIO(read_text("file", path, LARGEST_FILE), newline=""))
    try:
        if next(reader, None) != header:
            raise UserError("header", f"{path}:1", "does not fit the forms of the phrase bank", allowed=",".join(header))
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if len(row) != len(header):
                raise UserError("row", where, f"has {len(row)} cells instead of {len(header)}", mend="Quote cells that hold a comma")
            department, agreement, *forms, measures = (cell.strip() for cell in row)
            keys = tuple(key for key in measures.split("/") if key)
            if department not in spec.departments:
                raise UserError("department", where, f"{department!r} is unknown", allowed=spec.departments)
            for word, by_class in bank.agree.items():
                if agreement not in by_class:
                    raise UserError("class", where, f"{agreement!r} is unknown to agree.{word}", allowed=list(by_class))
            for key in keys:
                if key not in bank.measures:
                    raise UserError("measure", where, f"{key!r} is unknown", allowed=list(bank.measures))
            if not forms[0]:
                raise UserError(bank.forms[0], where, "is empty", mend="The first form names the product")
            if forms[0].casefold() in seen:
                raise UserError(bank.forms[0], where, f"{forms[0]!r} stands twice", mend="Remove one of the rows")
            seen.add(forms[0].casefold())
            named = {name: form for name, form in zip(bank.forms, forms, strict=True) if form}
            products.append(Product(department, agreement, named, keys))
    except csv.Error as error:
        raise UserError("row", f"{path}:{reader.line_num}", f"is not CSV ({error})", mend="Mend that line") from None
    return products


def _load_patterns(spec: Spec, bank: Bank, lines: list[Text], intent: str, path: Path) -> list[Pattern]:
    if not lines:
        where = f"{path}:{line_of(path, ('intents', intent))}"
        raise UserError(f"intents.{intent}", where, "has no pattern", mend="Write at least one pattern for every intent")
    allowed = allowed_placeholders(spec, bank, intent)
    patterns: dict[str, Pattern] = {}
    for line in lines:
        where = f"{path}:{line.line}"
        try:
            pattern = make_pattern(line, bank.language, intent)
        except ValueError as error:
            raise UserError(f"intents.{intent}", where, str(error), mend="Mend that pattern") from None
        if _may_be_empty(pattern.nodes):
            raise UserError(f"intents.{intent}", where, "may say nothing at all", mend="Let some of the pattern always be said")
        for placeholder in pattern.placeholders:
            if placeholder.name not in allowed:
                raise UserError(
                    f"intents.{intent}", where, f"placeholder {{{placeholder.name}}} does not fit the intent", allowed=sorted(allowed)
                )
            if placeholder.form and not has_forms(spec, placeholder.name):
                problem = f"placeholder {{{placeholder.name}}} has no forms, so {placeholder.form!r} would say nothing"
                raise UserError(f"intents.{intent}", where, problem, mend=f"Write {{{placeholder.name}}}")
            if placeholder.form and placeholder.form not in bank.forms:
                raise UserError(f"intents.{intent}", where, f"form {placeholder.form!r} is unknown", allowed=bank.forms)
        for slot, use in spec.intents[intent].slots.items():
            names = _names_that_fill(spec, slot)
            if use == "always" and not _fills(pattern.nodes, names):
                problem = f"may leave out {slot}, which {intent} always has"
                raise UserError(f"intents.{intent}", where, problem, allowed=sorted(f"{{{name}}}" for name in names & allowed))
        patterns[pattern.id] = pattern
    return list(patterns.values())


def _names_that_fill(spec: Spec, slot: str) -> set[str]:
    kind = spec.slots[slot].type
    return {slot} | ({COUNTED} if kind in ("catalog", "integer") else set()) | ({DIGITS} if kind == "integer" else set())


def _fills(nodes: tuple[Node, ...], names: set[str]) -> bool:
    """Whether every way to say it has one of these placeholders."""
    return any(
        all(_fills(option, names) for option in node.options)
        if isinstance(node, Choice)
        else isinstance(node, Placeholder) and node.name in names
        for node in nodes
    )


def _may_be_empty(nodes: tuple[Node, ...]) -> bool:
    """Whether there is a way to say it that has no character but spaces."""
    return all(
        any(_may_be_empty(option) for option in node.options) if isinstance(node, Choice) else isinstance(node, str) and not node.strip()
        for node in nodes
    )


def allowed_placeholders(spec: Spec, bank: Bank, intent: str) -> set[str]:
    """The names that may stand in braces in a pattern of an intent."""
    slots = spec.intents[intent].slots
    allowed = set(slots) | set(bank.agree)
    has_product = any(isinstance(spec.slots[slot], CatalogSlot) for slot in slots)
    if any(spec.slots[slot].type == "integer" for slot in slots):
        allowed |= {DIGITS, OTHER} | ({COUNTED} if has_product else set())
    if not has_product:
        allowed.add(MENTION)
    return allowed


def has_forms(spec: Spec, placeholder: str) -> bool:
    """Whether a form may stand behind a placeholder's name, as in `{product.pl}`."""
    return placeholder == MENTION or isinstance(spec.slots.get(placeholder), CatalogSlot)


def make_pattern(text: str, language: str, intent: str, origin: str = "") -> Pattern:
    """A line of a phrase bank as a pattern.

    Args:
        origin: begins its id, where it is not a phrase bank that it comes from.

    Raises:
        ValueError: as `parse_pattern`.
    """
    digest = hashlib.sha256(f"{language}\n{intent}\n{text}".encode()).hexdigest()[:8]
    return Pattern(f"{origin}{language}.{intent}.{digest}", intent, str(text), parse_pattern(text))


_TOKEN = re.compile(r"[\[\]()|]|\{([^{}]*)\}|[^\[\]()|{}]+|.", re.DOTALL)


def parse_pattern(text: str) -> tuple[Node, ...]:
    """Parse a pattern into nodes.

    Raises:
        ValueError: brackets that do not balance or are nested more than `DEEPEST` deep, or an empty placeholder.
    """
    tokens = [match.group() for match in _TOKEN.finditer(text)]
    position = 0

    def sequence(closing: str, depth: int = 0) -> tuple[list[tuple[Node, ...]], str]:
        nonlocal position
        if depth > DEEPEST:
            raise ValueError(f"brackets are nested more than {DEEPEST} deep in {text[:80]!r}")
        options: list[tuple[Node, ...]] = []
        nodes: list[Node] = []
        while position < len(tokens):
            token = tokens[position]
            position += 1
            if token in ("[", "("):
                inner, _ = sequence("]" if token == "[" else ")", depth + 1)
                nodes.append(Choice((*inner, ()) if token == "[" else tuple(inner)))
            elif token == closing:
                return [*options, tuple(nodes)], token
            elif token in ("]", ")"):
                raise ValueError(f"unexpected {token!r} in {text!r}")
            elif token == "|" and closing:
                options.append(tuple(nodes))
                nodes = []
            elif re.fullmatch(r"\{[\w]+(\.[\w]+)?\}", token):
                name, _, form = token[1:-1].partition(".")
                nodes.append(Placeholder(name, form or None))
            elif token[0] in "{}|":
                raise ValueError(f"stray {token!r} in {text!r}")
            else:
                nodes.append(token)
        if closing:
            raise ValueError(f"missing {closing!r} in {text!r}")
        return [*options, tuple(nodes)], ""

    return sequence("")[0][0]


def _placeholders(nodes: tuple[Node, ...]) -> Iterator[Placeholder]:
    for node in nodes:
        if isinstance(node, Placeholder):
            yield node
        elif isinstance(node, Choice):
            for option in node.options:
                yield from _placeholders(option)
