"""The validators of a teacher's answers: what passes, and what is rejected for which reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tasks.domain.bank import load_bank, make_pattern
from tasks.domain.scoring import normalise
from tasks.domain.spec import load_spec
from tasks.domain.utterances import split_catalogs, split_patterns
from tasks.teaching.asking import Request
from tasks.teaching.language import Languages
from tasks.teaching.literals import SpeltNames
from tasks.teaching.validators import Judge, as_pattern, as_product

pytestmark = pytest.mark.fast
SPEC = load_spec("ecommerce")
BANKS = {language: load_bank(SPEC, language) for language in ("en", "de", "hr")}


@pytest.fixture(scope="module")
def untouched() -> Judge:
    """One that has let nothing pass yet, which takes a second to make."""
    return Judge(SPEC, BANKS)


@pytest.fixture
def judge(untouched: Judge) -> Judge:
    made = copy.copy(untouched)
    made._passed = {of: [*passed] for of, passed in untouched._passed.items()}
    return made


def request(kind: str, topic: str, language: str = "en") -> Request:
    return Request(
        kind, language, topic, "plain", ({"role": "user", "content": 'Right: {"text": "pop two trombones in, would you"}'},), {}, "m", 1
    )


def held_out_name(language: str = "en") -> str:
    return split_catalogs(BANKS, SPEC)[language]["test"][0].name


GOOD = [
    ("add_to_cart", "en", {"text": "gimme three brass kettles will you", "product": "brass kettles", "quantity": 3}),
    ("add_to_cart", "en", {"text": "I could do with a brass kettle to be honest", "product": "brass kettle", "quantity": None}),
    ("add_to_cart", "en", {"text": "two brass kettles, no wait, make it 4", "product": "brass kettles", "quantity": 4}),
    ("add_to_cart", "de", {"text": "Ich hätte gern zwölf Messingkessel, danke dir", "product": "Messingkessel", "quantity": 12}),
    ("track_order", "en", {"text": "where on earth is #A-90210, it is late again", "order_id": "#A-90210"}),
    ("track_order", "en", {"text": "where on earth is my parcel, it is late again", "order_id": None}),
    ("track_order", "en", {"text": "any news of order AB1234/12345 by now", "order_id": "AB1234/12345"}),
    ("apply_coupon", "en", {"text": "try that BLACKFRIDAY-2024 of yours, please", "coupon_code": "BLACKFRIDAY-2024"}),
    ("apply_coupon", "en", {"text": "take WELCOME off that basket, please", "coupon_code": "WELCOME"}),
    ("add_to_cart", "en", {"text": "stick a New Balance running vest in there", "product": "New Balance running vest", "quantity": None}),
    ("add_to_cart", "de", {"text": "Ich hätte gern zweimal Messingkessel, danke dir", "product": "Messingkessel", "quantity": 2}),
    ("view_cart", "hr", {"text": "ma daj pokaži što sam sve dosad nabacao u košaricu"}),
    ("out_of_scope", "en", {"text": "🙃🙃"}),
]  # fmt: skip


@pytest.mark.parametrize(("intent", "language", "item"), GOOD)
def test_a_right_utterance_passes(judge: Judge, intent: str, language: str, item: dict[str, Any]) -> None:
    row, reason = judge.judge(item, request("utterances", intent, language))
    assert reason is None and row is not None
    wanted = {"intent": intent, **{name: value for name, value in item.items() if name != "text" and value is not None}}
    if intent == "add_to_cart":
        wanted.setdefault("quantity", 1)  # what holds when none is stated
    if "order_id" in wanted:
        wanted["order_id"] = wanted["order_id"].lstrip("#")
    assert row["gold"] == wanted and row["source"] == request("utterances", intent, language).hash


BAD = [
    ("wrong_schema", "add_to_cart", {"text": 7, "product": "brass kettle", "quantity": 1}),
    ("wrong_schema", "add_to_cart", {"text": "one brass kettle please", "product": "brass kettle", "colour": "red"}),
    ("wrong_schema", "add_to_cart", {"text": "two brass kettles please", "product": "brass kettles", "quantity": "two"}),
    ("wrong_schema", "add_to_cart", {"text": "one brass kettle please", "product": "brass kettle", "intent": "checkout"}),
    ("wrong_schema", "add_to_cart", ["one brass kettle please"]),
    ("missing_slot", "add_to_cart", {"text": "put it in the basket for me", "product": None, "quantity": 1}),
    ("missing_slot", "update_quantity", {"text": "change the brass kettles", "product": "brass kettles", "quantity": None}),
    ("slot_not_in_text", "add_to_cart", {"text": "one copper pot for me please", "product": "brass kettle", "quantity": 1}),
    ("slot_not_in_text", "add_to_cart", {"text": "steak knives for me, as always", "product": "tea", "quantity": 1}),
    ("slot_not_in_text", "add_to_cart", {"text": "some brass kettles for me please", "product": "brass kettles", "quantity": 5}),
    ("slot_not_in_text", "track_order", {"text": "where is my order number 12345", "order_id": "54321"}),
    ("unlabelled_number", "add_to_cart", {"text": "five brass kettles for me please", "product": "brass kettles", "quantity": None}),
    ("unlabelled_number", "add_to_cart", {"text": "5 brass kettles for me please", "product": "brass kettles", "quantity": 1}),
    ("unlabelled_number", "track_order", {"text": "where is my order number 12345", "order_id": None}),
    ("wrong_language", "view_cart", {"text": "Zeig mir doch bitte einmal meinen Warenkorb an"}),
    ("wrong_language", "view_cart", {"text": "montre-moi ce qu'il y a dans mon panier"}),
    ("implausible", "view_cart", {"text": "show me {cart} please"}),
    ("implausible", "view_cart", {"text": "show me [your basket] please"}),
    ("implausible", "view_cart", {"text": "see https://example.com for my cart"}),
    ("implausible", "view_cart", {"text": "!!!"}),
    ("implausible", "view_cart", {"text": "show me my cart " * 40}),
    ("implausible", "add_to_cart", {"text": "get me the brass kettle now", "product": "the brass kettle", "quantity": 1}),
    ("implausible", "add_to_cart", {"text": "get me two bunches of bananas now", "product": "bunches of bananas", "quantity": 2}),
    ("unlabelled_number", "add_to_cart", {"text": "fourteen brass kettles for me please", "product": "brass kettles", "quantity": None}),
    ("slot_not_in_text", "add_to_cart", {"text": "fourteen brass kettles for me please", "product": "brass kettles", "quantity": 4}),
    ("slot_not_in_text", "add_to_cart", {"text": "twenty-four brass kettles for me", "product": "brass kettles", "quantity": 20}),
    ("slot_not_in_text", "add_to_cart", {"text": "thirty-four brass kettles for me", "product": "brass kettles", "quantity": 4}),
    ("unlabelled_number", "add_to_cart", {"text": "thirty-four brass kettles for me", "product": "brass kettles", "quantity": None}),
    ("wrong_schema", "track_order", {"text": "where on earth is my order right now", "order_id": "order"}),
    ("wrong_schema", "apply_coupon", {"text": "put the discount on my basket please", "coupon_code": "discount"}),
    ("implausible", "add_to_cart", {"text": "get me 2 brass kettles now", "product": "2 brass kettles", "quantity": 2}),
    ("refusal", "view_cart", {"text": "As an AI language model I cannot see your cart"}),
    ("duplicate", "view_cart", {"text": "pop two trombones in, would you"}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "intent", "item"), BAD)
def test_a_wrong_utterance_is_rejected_with_its_reason(judge: Judge, reason: str, intent: str, item: Any) -> None:
    assert judge.judge(item, request("utterances", intent)) == (None, reason)


def test_products_of_evaluation_and_near_duplicates_are_rejected(judge: Judge) -> None:
    name = held_out_name()
    item = {"text": f"hey stick {name} in there", "product": name, "quantity": 1}
    assert judge.judge(item, request("utterances", "add_to_cart")) == (None, "product_of_evaluation")
    more = {"text": f"hey stick a scarlet {name} in there", "product": f"scarlet {name}", "quantity": 1}
    assert judge.judge(more, request("utterances", "add_to_cart")) == (None, "product_of_evaluation")
    first = {"text": "let me see everything I picked so far"}
    assert judge.judge(first, request("utterances", "view_cart"))[1] is None
    assert judge.judge({"text": "Let me see everything I picked so far!!"}, request("utterances", "view_cart"))[1] == "duplicate"
    assert judge.judge({"text": "let me see everything i picked so farr"}, request("utterances", "view_cart"))[1] == "duplicate"


def test_no_text_names_a_product_of_evaluation_wherever_it_stands(judge: Judge) -> None:
    name = held_out_name()
    for intent, text in (
        ("view_cart", f"is the {name} in my cart already, can you show the cart"),
        ("out_of_scope", f"can I wash my {name.upper()}, say, in the dishwasher"),
        ("out_of_scope", f"can I wash my {held_out_name('de')} in the dishwasher at home"),
    ):
        assert judge.judge({"text": text}, request("utterances", intent)) == (None, "product_of_evaluation"), text
    labelled = {"text": f"get me a brass kettle, I have the {name} already", "product": "brass kettle", "quantity": 1}
    assert judge.judge(labelled, request("utterances", "add_to_cart")) == (None, "product_of_evaluation")


def test_no_pattern_spells_out_a_product_in_any_way_to_say_it(judge: Judge) -> None:
    name = next(p.name for p in split_catalogs(BANKS, SPEC)["en"]["test"] if len(p.name.split()) == 2)
    first, last = name.split()
    known = next(p.name for p in split_catalogs(BANKS, SPEC)["en"]["train"] if len(p.name.split()) == 2)
    for reason, intent, text in (
        ("product_of_evaluation", "add_to_cart", f"put {{counted}} and a {name} in my cart"),
        ("product_of_evaluation", "add_to_cart", f"put {{counted}} and a (brass|{first}) {last} in my cart"),
        ("product_of_evaluation", "add_to_cart", f"put {{counted}} and a {first}[ {last}] in my cart"),
        ("product_of_evaluation", "add_to_cart", f"put {{counted}} and a {first[:2]}({first[2:]}|xy) {last} in my cart"),
        ("product_of_evaluation", "out_of_scope", f"can I wash {{agood}}{name} in the dishwasher"),
        ("product_in_pattern", "add_to_cart", f"put {{counted}} and a {known} in my cart"),
        (None, "view_cart", "what is in my shopping basket by now"),  # a product, and what the phrase bank itself calls the cart
        (None, "add_to_cart", f"put {{counted}} beside {first}{last} in my cart"),
    ):
        assert judge._problem_of_pattern(make_pattern(text, "en", intent), BANKS["en"]) == reason, text


def test_a_pattern_of_a_million_ways_is_read_once() -> None:
    ways = make_pattern("(a|b|ab|c)[ ]" * 30 + "red wine", "en", "view_cart")
    assert SpeltNames(["red wine", "a b", "a ab c"]).held_by(ways.nodes) >= {"red wine", "a b", "a ab c"}


def test_the_phrase_banks_say_no_product_of_evaluation_and_few_others(judge: Judge) -> None:
    """So the rejection of names makes no teacher unusable that writes as these banks were written."""
    said = {language: judge._said[language] for language in BANKS}
    assert not any(names & judge._held_out_spelt for names in said.values()) and sum(map(len, said.values())) < 10, said


PATTERNS = [
    (None, "add_to_cart", "en", "stick {counted} in [for me], would you"),
    (None, "search_product", "de", "Sagt mal, führt ihr irgendwo auch {product.some}, frage für einen Freund"),
    (None, "view_cart", "en", "hold on, what did I (end up with|pick) so far?"),
    ("pattern_syntax", "add_to_cart", "en", "stick {counted in"),
    ("pattern_syntax", "add_to_cart", "en", "stick {counted} in (for me"),
    ("unknown_placeholder", "view_cart", "en", "what of {product} is in my cart"),
    ("unknown_placeholder", "add_to_cart", "en", "stick {product.dative} in, would you"),
    ("unknown_placeholder", "add_to_cart", "en", "stick {quantity.pl} {product} in, would you"),
    ("missing_slot", "add_to_cart", "en", "stick [{product}] in, would you"),
    ("missing_slot", "update_quantity", "en", "make it more {product} than before"),
    ("number_in_pattern", "add_to_cart", "en", "stick two {product.pl} in, would you"),
    ("number_in_pattern", "track_order", "en", "where is order 12345 hiding"),
    ("wrong_language", "view_cart", "en", "Zeig mir doch bitte einmal meinen ganzen Warenkorb an"),
    ("refusal", "view_cart", "en", "as an AI I cannot see the cart"),
    ("implausible", "view_cart", "en", "see https://example.com for my cart"),
    ("duplicate", "view_cart", "en", BANKS["en"].patterns["view_cart"][0].text),
    ("duplicate", "view_cart", "en", split_patterns(BANKS["en"].patterns["view_cart"])["hard"][0].text.upper()),
]


@pytest.mark.parametrize(("reason", "intent", "language", "text"), PATTERNS)
def test_a_pattern_is_judged(judge: Judge, reason: str | None, intent: str, language: str, text: str) -> None:
    row, found = judge.judge({"pattern": text}, request("patterns", intent, language))
    assert found == reason
    if row:
        assert as_pattern(row).text == text and as_pattern(row).id.startswith(f"teacher.{language}.{intent}.")


def test_a_product_is_judged(judge: Judge) -> None:
    good = {"class": "sc", "one": "brass kettle", "pl": "brass kettles", "measure": "box"}
    row, reason = judge.judge(good, request("products", "household"))
    assert reason is None and row is not None
    product = as_product(row)
    assert (product.name, product.form("pl"), product.measures, product.department) == (
        "brass kettle",
        "brass kettles",
        ("box",),
        "household",
    )
    wrong = {
        "duplicate": good,
        "unknown_class": {**good, "one": "tin whistle", "class": "zz"},
        "unknown_measure": {**good, "one": "tin whistle", "measure": "barrel"},
        "wrong_schema": {**good, "one": 3},
        "missing_slot": {**good, "one": " "},
        "product_of_evaluation": {**good, "one": held_out_name(), "pl": ""},
        "implausible": {**good, "one": "tin whistle", "pl": "goose"},
        "refusal": {**good, "one": "as an AI model", "pl": ""},
    }
    assert {name: judge.judge(item, request("products", "household"))[1] for name, item in wrong.items()} == {name: name for name in wrong}
    known = BANKS["en"].products[0].name
    assert judge.judge({**good, "one": known, "pl": ""}, request("products", "household"))[1] in ("duplicate", "product_of_evaluation")


@pytest.mark.slow
def test_the_phrase_banks_own_patterns_would_pass_but_for_being_known(judge: Judge) -> None:
    """The validators reject what people wrote for a reason they can defend: next to none for language or numbers."""
    reasons: dict[str, int] = {}
    total = 0
    for language, bank in BANKS.items():
        for intent, patterns in bank.patterns.items():
            for pattern in patterns:
                total += 1
                reason = judge._problem_of_pattern(pattern, bank) or judge._problem_of_expansions(
                    pattern, bank, request("patterns", intent, language)
                )
                reasons[str(reason)] = reasons.get(str(reason), 0) + 1
    assert reasons["None"] > 0.97 * total, reasons


def test_languages_are_told_apart() -> None:
    languages = Languages(["en", "de", "hr"])
    assert languages.may_be("wo bleibt denn bitte mein Paket", "de") and not languages.may_be("wo bleibt denn bitte mein Paket", "hr")
    assert languages.may_be("ok", "hr") and languages.may_be("anything at all", "tlh")  # too short to tell; a language it does not know


def test_normalised_products_of_evaluation_are_all_known_to_the_judge(judge: Judge) -> None:
    for parts in split_catalogs(BANKS, SPEC).values():
        assert all(judge._is_held_out(str(normalise(p.name)).upper()) for s in ("validation", "test", "hard") for p in parts[s])
